// The interface between the bindings and the CUDA kernels, without a CUDA header: addresses on the device
// and numbers in, launches on a stream out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../names.h"

namespace sparseopt::cuda {

// The hyperparameters of one parameter group. Where an address is not 0, the value is read there, on the
// device and in the type of the arithmetic, in place of the number before it.
struct Rule {
  double lr;
  uintptr_t lr_address;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
  Correction correction;
  double ham_alpha, ham_beta, gamma;
  uintptr_t gamma_address;
};

// A parameter. `momentum_buffer` is 0 without momentum, `bits` is 0 if it is dense: then it is one row.
struct Tensor {
  Dtype dtype;
  uintptr_t parameter, momentum_buffer;
  int64_t rows, columns;
  uintptr_t bits, mean_fan_in;
  bool ham;
};

// What one launch carries.
struct Launch {
  std::vector<size_t> tensors;
  std::vector<size_t> groups;  // a rule each
  std::vector<uint8_t> rule;   // of each tensor: an index into `groups`
  std::vector<uint32_t> first_block;
  uint32_t blocks = 0;
};

// The tensors of a batch, all of one dtype, and how they are shared out among launches.
class Table {
 public:
  Table(std::vector<Tensor> tensors, std::vector<size_t> groups);

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const std::vector<size_t>& groups() const { return groups_; }
  const std::vector<Launch>& launches() const { return launches_; }
  Dtype dtype() const { return tensors_.empty() ? Dtype::kFloat32 : tensors_.front().dtype; }
  int64_t partial_sum_count() const;

 private:
  std::vector<Tensor> tensors_;
  std::vector<size_t> groups_;
  std::vector<Launch> launches_;
};

// What changes from step to step.
struct Step {
  std::vector<uintptr_t> grads;
  std::vector<const Rule*> rules;
  uintptr_t grad_scale = 0, found_inf = 0;
};

// Both return when the work is queued on the stream (a cudaStream_t). `step` returns how many launches
// there were.
int step(const Table& table, const Step& step, uintptr_t stream);
void squared_norm(const Table& table, const Step& step, uintptr_t partial_sums, uintptr_t stream);

// Packs a boolean mask of one byte per weight, rows padded with zeros to whole bytes, and counts it.
void pack(uintptr_t mask, int64_t rows, int64_t columns, uintptr_t bits, uintptr_t nnz, uintptr_t stream);

extern const int kTensorsPerLaunch;

}  // namespace sparseopt::cuda
