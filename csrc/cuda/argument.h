// What a kernel is given: a table of tensors by value, in the 4096 bytes that every GPU takes as a kernel's
// arguments. Nothing is copied to the device beforehand, so a step can be captured in a CUDA graph.
#pragma once

#include "../update_rule.h"
#include "table.h"

namespace sparseopt::cuda {

constexpr int kCapacity = 58;     // tensors in one launch
constexpr int kRuleCapacity = 4;  // parameter groups in one launch

struct TensorArgument {
  void* parameter;
  const void* grad;
  void* momentum_buffer;
  const uint8_t* bits;
  const void* mean_fan_in;
  int64_t rows, columns;
  uint32_t first_block;
  uint8_t rule;
  bool ham;
};

template <class T>
struct RuleArgument {
  Coefficients<T> coefficients;
  T gamma;
  const T* lr_address;
  const T* gamma_address;
  Correction correction;
  bool nesterov, maximize, ham;
};

template <class T>
struct Argument {
  TensorArgument tensors[kCapacity];
  RuleArgument<T> rules[kRuleCapacity];
  const float* grad_scale;
  const float* found_inf;
  T* partial_sums;
  int count;
};

static_assert(sizeof(TensorArgument) == 64, "the capacity was chosen for 64 bytes");
static_assert(sizeof(Argument<double>) <= 4096 && sizeof(Argument<float>) <= 4096,
              "more than every GPU takes");

// The argument of one launch. The conversions to T are made here, so that a float kernel has no double.
template <class T>
Argument<T> argument_of(const Table& table, const Launch& launch, const Step& step) {
  Argument<T> argument{};
  argument.grad_scale = reinterpret_cast<const float*>(step.grad_scale);
  argument.found_inf = reinterpret_cast<const float*>(step.found_inf);
  argument.count = static_cast<int>(launch.tensors.size());
  for (size_t i = 0; i < launch.groups.size(); ++i) {
    const Rule& rule = *step.rules.at(launch.groups[i]);
    argument.rules[i] = {{T(rule.lr), T(rule.momentum), T(1.0 - rule.dampening), T(rule.weight_decay),
                          T(rule.ham_alpha), T(rule.ham_beta)},
                         T(rule.gamma),
                         reinterpret_cast<const T*>(rule.lr_address),
                         reinterpret_cast<const T*>(rule.gamma_address),
                         rule.correction,
                         rule.nesterov,
                         rule.maximize,
                         rule.ham_alpha != 0 || rule.ham_beta != 0};
  }
  for (size_t i = 0; i < launch.tensors.size(); ++i) {
    const size_t index = launch.tensors[i];
    const Tensor& tensor = table.tensors()[index];
    TensorArgument& to = argument.tensors[i];
    to.parameter = reinterpret_cast<void*>(tensor.parameter);
    to.grad = reinterpret_cast<const void*>(step.grads[index]);
    to.momentum_buffer = reinterpret_cast<void*>(tensor.momentum_buffer);
    to.bits = reinterpret_cast<const uint8_t*>(tensor.bits);
    to.mean_fan_in = reinterpret_cast<const void*>(tensor.mean_fan_in);
    to.rows = tensor.rows;
    to.columns = tensor.columns;
    to.first_block = launch.first_block[i];
    to.rule = launch.rule[i];
    to.ham = tensor.ham;
  }
  return argument;
}

}  // namespace sparseopt::cuda
