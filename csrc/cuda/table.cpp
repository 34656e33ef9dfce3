#include "table.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "argument.h"
#include "shares.h"

namespace sparseopt::cuda {

const int kTensorsPerLaunch = kCapacity;

namespace {

void validate(const std::vector<Tensor>& tensors, const std::vector<size_t>& groups) {
  if (tensors.size() != groups.size())
    throw std::invalid_argument("tensors and groups must be of one length");
  for (const Tensor& tensor : tensors)
    if (tensor.dtype != tensors.front().dtype)
      throw std::invalid_argument("the tensors of a table must be of one dtype");
}

// The rule that a launch carries for a group; its capacity if there is no room for one more.
size_t rule_for(Launch& launch, size_t group) {
  const auto found = std::find(launch.groups.begin(), launch.groups.end(), group);
  const size_t rule = static_cast<size_t>(found - launch.groups.begin());
  if (found == launch.groups.end() && rule < kRuleCapacity) launch.groups.push_back(group);
  return rule;
}

}  // namespace

Table::Table(std::vector<Tensor> tensors, std::vector<size_t> groups)
    : tensors_(std::move(tensors)), groups_(std::move(groups)) {
  validate(tensors_, groups_);
  // By group, so that many groups do not make many launches.
  std::vector<size_t> order(tensors_.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [this](size_t left, size_t right) { return groups_[left] < groups_[right]; });
  for (const size_t index : order) {
    const Tensor& tensor = tensors_[index];
    if (tensor.rows <= 0 || tensor.columns <= 0) continue;
    if (launches_.empty() || launches_.back().tensors.size() == kCapacity) launches_.emplace_back();
    size_t rule = rule_for(launches_.back(), groups_[index]);
    if (rule == kRuleCapacity) {
      launches_.emplace_back();
      rule = rule_for(launches_.back(), groups_[index]);
    }
    Launch& launch = launches_.back();
    launch.tensors.push_back(index);
    launch.rule.push_back(static_cast<uint8_t>(rule));
    launch.first_block.push_back(launch.blocks);
    launch.blocks += static_cast<uint32_t>(blocks_of(tensor.rows, tensor.columns, tensor.bits != 0));
  }
}

int64_t Table::partial_sum_count() const {
  int64_t blocks = 0;
  for (const Launch& launch : launches_) blocks += launch.blocks;
  return 2 * blocks;
}

}  // namespace sparseopt::cuda
