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
  std::vector<size_t> groups;  // which parameter group (rule) each belongs to
};

// What a step does, for gradients at certain addresses, 8 bytes each.
inline std::vector<Update> updates_of(const Table& table, std::string_view addresses,
                                      const std::vector<const Rule*>& rules) {
  const size_t count = table.tensors.size();
  if (addresses.size() != count * sizeof(uintptr_t))
    throw std::invalid_argument("grads must have one address per tensor");
  std::vector<Update> updates;
  updates.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const void* grad;
    std::memcpy(&grad, addresses.data() + i * sizeof grad, sizeof grad);
    updates.push_back({table.tensors[i], grad, rules.at(table.groups[i])});
  }
  return updates;
}

// Looks at a part of the masks and weights, or at all of them: whether any was written without anybody being
// told. Which ones, their watches know.
inline bool any_written(const Table& table, bool everything) {
  bool found = false;
  for (const Tensor* tensor : table.tensors)
    if (tensor->watch) found |= tensor->watch->look(tensor->parameter, tensor->dtype, everything);
  return found;
}

}  // namespace sparseopt::cpu
