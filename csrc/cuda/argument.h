// Arguments of kernels that are passed by value, in the 4096 bytes that every GPU takes: rules, and the
// addresses of gradients. Nothing is copied to the device when these change.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "../update_rule.h"
#include "launches.h"
#include "tables.h"

namespace sparseopt::cuda {

constexpr int kTensorCapacity = 400;  // of one launch
constexpr int kRuleCapacity = 8;

template <class T>
struct RuleArgument {
  Coefficients<T> coefficients;
  T gamma;
  const T* lr_address;
  const T* gamma_address;
  bool nesterov, maximize, ham;
};

// The arguments of all kernels that read gradients.
template <class T>
struct InputArgument {
  const float* grad_scale;
  const float* found_inf;
  RuleArgument<T> rules[kRuleCapacity];
  int64_t gradients[kTensorCapacity];
};

template <class T>
struct StepArgument {
  const StepRow* table;
  const int32_t* block_to_tensor;
  InputArgument<T> inputs;
};

template <class T>
struct SectorArgument {
  const SectorRow* table;
  const int32_t* chunk_to_tensor;
  const int64_t* chunks;
  T* sums;
  bool wide;
  InputArgument<T> inputs;
};

static_assert(sizeof(SectorArgument<double>) <= 4096 && sizeof(StepArgument<double>) <= 4096,
              "more than every GPU takes");

// Numbers are converted to T on the host, so that a float kernel has no double.
template <class T>
RuleArgument<T> rule_argument(const Rule& rule) {
  return {{T(rule.lr), T(rule.momentum), T(1.0 - rule.dampening), T(rule.weight_decay), T(rule.ham_alpha),
           T(rule.ham_beta)},
          T(rule.gamma),
          reinterpret_cast<const T*>(rule.lr_address),
          reinterpret_cast<const T*>(rule.gamma_address),
          rule.nesterov,
          rule.maximize,
          rule.ham_alpha != 0 || rule.ham_beta != 0};
}

template <class T>
InputArgument<T> input_argument(const Inputs& inputs) {
  InputArgument<T> argument{};
  const size_t tensors = inputs.gradients.size() / sizeof(int64_t), rules = inputs.rules.size();
  if (tensors > kTensorCapacity || rules > kRuleCapacity)
    throw std::invalid_argument("there are " + std::to_string(tensors) + " gradients and " +
                                std::to_string(rules) + " rules, a launch takes " +
                                std::to_string(kTensorCapacity) + " and " + std::to_string(kRuleCapacity));
  argument.grad_scale = reinterpret_cast<const float*>(inputs.grad_scale);
  argument.found_inf = reinterpret_cast<const float*>(inputs.found_inf);
  for (size_t i = 0; i < rules; ++i) argument.rules[i] = rule_argument<T>(inputs.rules[i]);
  std::memcpy(argument.gradients, inputs.gradients.data(), tensors * sizeof(int64_t));
  return argument;
}

template <class T>
SectorArgument<T> sector_argument(const SectorLaunch& launch, const Inputs& inputs, uintptr_t sums) {
  return {reinterpret_cast<const SectorRow*>(launch.table),
          reinterpret_cast<const int32_t*>(launch.chunk_to_tensor),
          reinterpret_cast<const int64_t*>(launch.chunks),
          reinterpret_cast<T*>(sums),
          launch.wide,
          input_argument<T>(inputs)};
}

}  // namespace sparseopt::cuda
