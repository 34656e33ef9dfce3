#include "drop_and_grow.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

namespace sparseopt::cpu {
namespace {

// Weights of a thread: to wake one for fewer costs more than it saves. RigL updates of ResNet-20: 1 << 12 and
// 1 << 18 take 0.99 and 1.21 of its time (make tuning, Zen 3; noise 2%).
constexpr int64_t kFewestPerThread = 1 << 15;

// The memory of the last update, half a byte per weight. To allocate it anew would take as long as an update.
std::mutex spare_mutex;
std::vector<Selection> spare;

// Calls body(i, threads) for each size. A large one gets all threads. The others get one each, because much
// of a choice is serial; the largest are begun first.
template <class Body>
void for_sizes(const std::vector<int64_t>& sizes, int threads, Body body) {
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
  threads = static_cast<int>(std::clamp<int64_t>(total / kFewestPerThread, 1, std::max(threads, 1)));
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return sizes[i] > sizes[j]; });
  const int64_t count = static_cast<int64_t>(order.size());
  int64_t large = 0;
  for (; large < count && (threads == 1 || sizes[order[size_t(large)]] > total / threads); ++large)
    body(order[size_t(large)], threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = large; i < count; ++i) body(order[size_t(i)], 1);
}

}  // namespace

DropAndGrow::DropAndGrow(std::vector<MaskedLayer> layers, int threads) : layers_(std::move(layers)) {
  {
    const std::lock_guard<std::mutex> lock(spare_mutex);
    selections_.swap(spare);
  }
  selections_.resize(layers_.size());
  std::vector<int64_t> sizes;
  for (const MaskedLayer& layer : layers_) sizes.push_back(layer.numel);
  for_sizes(sizes, threads, [&](size_t i, int own_threads) {
    const MaskedLayer& layer = layers_[i];
    selections_[i].begin(layer.mask, layer.numel, layer.min_fan_in, layer.neurons, own_threads);
  });
}

DropAndGrow::~DropAndGrow() {
  const std::lock_guard<std::mutex> lock(spare_mutex);
  selections_.swap(spare);
}

std::vector<int64_t> DropAndGrow::active() const {
  std::vector<int64_t> counts;
  for (const Selection& selection : selections_) counts.push_back(selection.active());
  return counts;
}

std::vector<int64_t> DropAndGrow::missing() const {
  std::vector<int64_t> counts;
  for (const Selection& selection : selections_) counts.push_back(selection.missing());
  return counts;
}

bool DropAndGrow::rank(const std::vector<Scores>& scores, int threads) {
  std::vector<int64_t> sizes;
  for (const Scores& own : scores) sizes.push_back(layers_.at(own.layer).numel);
  std::vector<uint8_t> finite(scores.size());
  for_sizes(sizes, threads, [&](size_t i, int own_threads) {
    const Scores& own = scores[i];
    finite[i] = selections_[own.layer].rank(own.dtype, own.values, own.at_most, own.fills, own_threads);
  });
  return std::all_of(finite.begin(), finite.end(), [](uint8_t own) { return own != 0; });
}

bool DropAndGrow::sees_active() const {
  return std::any_of(selections_.begin(), selections_.end(),
                     [](const auto& own) { return own.sees_active(); });
}

bool DropAndGrow::sees_inactive() const {
  return std::any_of(selections_.begin(), selections_.end(),
                     [](const auto& own) { return own.sees_inactive(); });
}

std::vector<LayerUpdate> DropAndGrow::update(const std::vector<Change>& changes, int threads) {
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Selection& selection = selections_[i];
    const Change& own = changes.at(i);
    const bool changes_mask = own.drop > 0 || own.grow > 0;
    if (own.drop < 0 || own.drop > selection.active())
      throw std::invalid_argument("k is out of range: it must be at most the number of active weights");
    if (own.grow < 0 || own.grow > layers_[i].numel - selection.active() + own.drop)
      throw std::invalid_argument("k is out of range: there are fewer weights that can grow");
    if (own.grow > 0 && !own.seeds && own.grow > selection.at_most())
      throw std::invalid_argument("k is larger than was told to rank()");
    if (own.grow > 0 && own.grow < selection.missing())
      throw std::invalid_argument("k is smaller than what neurons are missing");
    if (changes_mask && !selection.is_possible())
      throw std::invalid_argument("min_fan_in is out of range: there are too few active weights");
    sizes.push_back(changes_mask ? layers_[i].numel : 0);
  }
  std::vector<LayerUpdate> updates(layers_.size());
  for_sizes(sizes, threads, [&](size_t i, int own_threads) {
    if (sizes[i] == 0) return;
    const MaskedLayer& layer = layers_[i];
    const Change& own = changes[i];
    selections_[i].explore(layer.explored, own_threads);
    selections_[i].drop_smallest(own.dtype, own.drop_scores, own.drop, own_threads);
    if (own.grow > 0 && own.seeds)
      selections_[i].grow_random(own.grow - own.drop, own.seeds->second, own.seeds->first);
    else if (own.grow > 0)
      selections_[i].grow_largest(own.grow - own.drop);
    // In the same loop, while the layer is in the cache.
    updates[i] = selections_[i].apply(layer.dtype, layer.mask, layer.weights, layer.explored);
  });
  return updates;
}

}  // namespace sparseopt::cpu
