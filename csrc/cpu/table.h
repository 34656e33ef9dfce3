// The tensors that are updated in one call, and by which rules.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "step.h"

namespace sparseopt::cpu {

struct Table {
  std::vector<const Tensor*> tensors;
  std::vector<size_t> rules;     // of each: its index among those of a step
  mutable size_t looks = 0;      // how often any_written has looked
  mutable bool written = false;  // what it has found since forget()

  void forget() const { written = false; }
};

// What a step does, for gradients at certain addresses, 8 bytes each.
inline std::vector<TensorStep> updates_of(const Table& table, std::string_view addresses,
                                          const std::vector<const Rule*>& rules) {
  const size_t count = table.tensors.size();
  if (addresses.size() != count * sizeof(uintptr_t))
    throw std::invalid_argument("grads must have one address per tensor");
  std::vector<TensorStep> updates;
  updates.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const void* grad;
    std::memcpy(&grad, addresses.data() + i * sizeof grad, sizeof grad);
    updates.push_back({table.tensors[i], grad, rules.at(table.rules[i])});
  }
  return updates;
}

// Tensors that a step looks at, about: each costs a few cache misses, 0.3 us. With all 3162 layers of 32x32
// it was 7 to 10% of a step. More of them take turns.
constexpr size_t kLookedAt = 192;

// Looks at a part of the masks and weights, or at all of them: whether any was written without anybody being
// told, now or in a call before. Which ones, their watches know.
inline bool any_written(const Table& table, bool everything) {
  const size_t count = table.tensors.size(), stride = everything ? 1 : (count + kLookedAt - 1) / kLookedAt;
  for (size_t i = stride == 0 ? 0 : table.looks++ % stride; i < count; i += stride) {
    const Tensor* tensor = table.tensors[i];
    if (tensor->watch) table.written |= tensor->watch->look(tensor->parameter, tensor->dtype, everything);
  }
  return table.written;
}

}  // namespace sparseopt::cpu
