// A step over some tensors: the interface between the bindings, the scheduling of the work (step.cpp) and the
// loops (loops.cpp, compiled once per instruction set).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../names.h"
#include "packed_mask.h"
#include "strategy.h"
#include "write_watch.h"

namespace sparseopt::cpu {

// The hyperparameters of some parameters of a group: those that are updated for the first time may have a
// rule of their own.
struct Rule {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  double ham_alpha, ham_beta, gamma;
};

// A parameter, its momentum buffer (null without momentum), its mask (null: dense), c_i of each run of the
// mask (empty: all are 1), and what notices unseen writes (null: nothing).
struct Tensor {
  Dtype dtype;
  void* parameter;
  void* momentum_buffer;
  int64_t numel;
  bool ham;
  const PackedMask* mask;
  std::vector<double> factors;
  WriteWatch* watch;
};

// The update of a tensor in one step. It leaves zeros in parameter and buffer outside the mask.
struct TensorStep {
  const Tensor* tensor;
  const void* grad;
  const Rule* rule;

  bool ham() const { return tensor->ham && (rule->ham_alpha != 0 || rule->ham_beta != 0); }
};

// Consecutive blocks of a tensor, which a thread takes at a time. The number of threads and the strategy do
// not change how tensors are cut into chunks, so that sums over chunks, added in order, are always the same.
struct Chunk {
  const TensorStep* update;
  int64_t begin, end;
  Strategy strategy;
  bool timed;
};

void step(const std::vector<TensorStep>& updates, int threads);

// Returns the sum of (c_i * g)^2 over the active weights; with `dense`, over all weights.
double squared_norm(const std::vector<TensorStep>& updates, int threads, bool dense);

// Returns the instruction sets that this processor can run, the best first.
std::vector<std::string> available_isas();

// The loops of one instruction set.
struct Loops {
  const char* isa;
  void (*update)(const Chunk&);
  double (*squared_norm)(const Chunk&, bool dense);
  void (*zero_outside)(const uint8_t* mask, void* data, int64_t count, int element_bytes);
};

// Returns the loops of the best instruction set, or of the one that SPARSEOPT_CPU_ISA names.
const Loops& chosen_loops();

}  // namespace sparseopt::cpu
