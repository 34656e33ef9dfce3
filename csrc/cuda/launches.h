// The interface between the bindings and the CUDA kernels, without a CUDA header. Functions take numbers and
// device addresses, and return when their work is queued on the stream.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "../names.h"

namespace sparseopt::cuda {

// The hyperparameters of some parameters. An address that is not 0 replaces the number before it: the kernel
// reads the value there, in the type of the arithmetic.
struct Rule {
  double lr;
  uintptr_t lr_address;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
  double ham_alpha, ham_beta, gamma;
  uintptr_t gamma_address;
};

// The arguments that may change with each step.
struct Inputs {
  std::string_view gradients;  // an address of 8 bytes for each tensor of the table
  std::vector<Rule> rules;     // those that the tensors of the launch refer to
  uintptr_t grad_scale, found_inf;
};

// A launch over tensors with new masks: `table` has a StepRow for each.
struct StepLaunch {
  Dtype dtype;
  uintptr_t table, block_to_tensor;
  int64_t blocks;
};

// A launch over the sectors of tensors: `table` has a SectorRow for each.
struct SectorLaunch {
  Dtype dtype;
  uintptr_t table, chunk_to_tensor, chunks;
  bool wide;
  int64_t most_chunks;
  int multiprocessors;
};

// A launch over masks of which lists are made: `table` has a ListRow for each.
struct Listing {
  Dtype dtype;
  uintptr_t table, block_to_tensor, fan_in, live;
  int64_t blocks;
};

void masked_step(const StepLaunch& launch, const Inputs& inputs, uintptr_t stream);
void sector_step(const SectorLaunch& launch, const Inputs& inputs, uintptr_t stream);
// Writes two numbers of the arithmetic type for each of `sector_blocks`.
void sector_squares(const SectorLaunch& launch, std::string_view gradients, uintptr_t sums, uintptr_t stream);
void count_rows(const Listing& listing, uintptr_t stream);
void list_sectors(const Listing& listing, uintptr_t ends, uintptr_t stream);

// Returns the CUDA version of the driver, 12080 for 12.8; 0 without a driver.
int driver_version();

}  // namespace sparseopt::cuda
