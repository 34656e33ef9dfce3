// One step over all parameters of one dtype: interface between the bindings, the scheduling of the work
// (step.cpp) and the loops (loops.cpp, compiled once per instruction set).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../names.h"
#include "packed_mask.h"
#include "strategy.h"
#include "write_watch.h"

namespace sparseopt::cpu {

// The hyperparameters of some parameters: those of a group that are updated for the first time have their
// own.
struct Rule {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  double ham_alpha, ham_beta, gamma;
};

// A parameter, its momentum buffer (null without momentum), its mask (null: dense), c_i of each run of the
// mask (empty: all of them are 1), and who notices writes to the mask (null: nobody).
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

// What one step does to one tensor. Outside the mask, parameter and buffer hold zeros.
struct TensorStep {
  const Tensor* tensor;
  const void* grad;
  const Rule* rule;

  bool ham() const { return tensor->ham && (rule->ham_alpha != 0 || rule->ham_beta != 0); }
};

// Consecutive blocks of a tensor: a piece of the work, small enough to share out and large enough to be worth
// it. How the work is cut depends on the tensors alone, never on the number of threads or on the strategy:
// sums over chunks, added in order, are the same for any of them.
struct Chunk {
  const TensorStep* update;
  int64_t begin, end;
  Strategy strategy;
  bool timed;
};

void step(const std::vector<TensorStep>& updates, int threads);

// The sum of (c_i * g)^2 over the active weights; with `dense`, over all of them, with the c_i of their rows.
double squared_norm(const std::vector<TensorStep>& updates, int threads, bool dense);

// The instruction sets this processor can run, the best first. The environment variable
// SPARSEOPT_CPU_ISA names the one to use.
std::vector<std::string> available_isas();

// The loops of one instruction set.
struct Loops {
  const char* isa;
  void (*update)(const Chunk&);
  double (*squared_norm)(const Chunk&, bool dense);
  void (*zero_outside)(const uint8_t* mask, void* data, int64_t count, int element_bytes);
};

// Those of the best instruction set, or of the one that was asked for.
const Loops& chosen_loops();

}  // namespace sparseopt::cpu
