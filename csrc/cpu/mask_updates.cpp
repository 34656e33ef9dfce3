#include "mask_updates.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

namespace sparseopt::cpu {
namespace {

constexpr int64_t kFewestPerThread = 1 << 15;  // weights: waking another one costs more than fewer take

// The memory of the last update, half a byte per weight: to get as much from the system again would take as
// long as an update.
std::mutex spare_mutex;
std::vector<MaskUpdate> spare;

// Calls body(i, threads) for each of the sizes. A large one gets all threads; of the others, each thread
// takes one at a time, the larger ones first, because much of a choice is serial.
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

MaskUpdates::MaskUpdates(std::vector<MaskedLayer> layers, int threads) : layers_(std::move(layers)) {
  {
    const std::lock_guard<std::mutex> lock(spare_mutex);
    updates_.swap(spare);
  }
  updates_.resize(layers_.size());
  std::vector<int64_t> sizes;
  for (const MaskedLayer& layer : layers_) sizes.push_back(layer.numel);
  for_sizes(sizes, threads, [&](size_t i, int own_threads) {
    const MaskedLayer& layer = layers_[i];
    updates_[i].begin(layer.mask, layer.numel, layer.min_fan_in, layer.neurons, own_threads);
  });
}

MaskUpdates::~MaskUpdates() {
  const std::lock_guard<std::mutex> lock(spare_mutex);
  updates_.swap(spare);
}

std::vector<int64_t> MaskUpdates::active() const {
  std::vector<int64_t> counts;
  for (const MaskUpdate& update : updates_) counts.push_back(update.active());
  return counts;
}

std::vector<int64_t> MaskUpdates::missing() const {
  std::vector<int64_t> counts;
  for (const MaskUpdate& update : updates_) counts.push_back(update.missing());
  return counts;
}

bool MaskUpdates::rank(const std::vector<Scores>& scores, int threads) {
  std::vector<int64_t> sizes;
  for (const Scores& own : scores) sizes.push_back(layers_.at(own.layer).numel);
  std::vector<uint8_t> finite(scores.size());
  for_sizes(sizes, threads, [&](size_t i, int own_threads) {
    const Scores& own = scores[i];
    finite[i] = updates_[own.layer].rank(own.dtype, own.values, own.at_most, own_threads);
  });
  return std::all_of(finite.begin(), finite.end(), [](uint8_t own) { return own != 0; });
}

bool MaskUpdates::scores_are_masked() const {
  const auto sees_active = [](const MaskUpdate& update) { return update.sees_active(); };
  const auto sees_inactive = [](const MaskUpdate& update) { return update.sees_inactive(); };
  return std::any_of(updates_.begin(), updates_.end(), sees_active) &&
         std::none_of(updates_.begin(), updates_.end(), sees_inactive);
}

std::vector<MaskChange> MaskUpdates::grow_largest(const std::vector<int64_t>& ks, int threads) {
  for (size_t i = 0; i < updates_.size(); ++i)
    if (ks.at(i) > updates_[i].at_most()) throw std::invalid_argument("k is larger than was told to rank()");
  check_missing(ks);
  return replace(ks, threads, [&](size_t i) { updates_[i].grow_largest(); });
}

std::vector<MaskChange> MaskUpdates::grow_random(const std::vector<int64_t>& ks,
                                                 const std::vector<uint64_t>& seeds,
                                                 const std::vector<uint64_t>& seeds_of_missing, int threads) {
  if (seeds.size() != layers_.size() || seeds_of_missing.size() != layers_.size())
    throw std::invalid_argument("there must be a seed for each layer");
  check_missing(ks);
  return replace(ks, threads, [&](size_t i) { updates_[i].grow_random(seeds[i], seeds_of_missing[i]); });
}

std::vector<MaskChange> MaskUpdates::drop(const std::vector<int64_t>& ks, int threads) {
  return replace(ks, threads, [](size_t) {});
}

void MaskUpdates::check_missing(const std::vector<int64_t>& ks) const {
  for (size_t i = 0; i < updates_.size(); ++i)
    if (ks.at(i) > 0 && ks[i] < updates_[i].missing())
      throw std::invalid_argument("k is smaller than what neurons are missing");
}

std::vector<MaskChange> MaskUpdates::replace(const std::vector<int64_t>& ks, int threads,
                                             const std::function<void(size_t)>& grow) {
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (ks.at(i) < 0 || ks[i] > updates_[i].active())
      throw std::invalid_argument("k is out of range: it must be at most the number of active weights");
    if (ks[i] > 0 && !updates_[i].is_possible())
      throw std::invalid_argument("min_fan_in is out of range: there are too few active weights");
    sizes.push_back(ks[i] == 0 ? 0 : layers_[i].numel);
  }
  std::vector<MaskChange> changes(layers_.size());
  for_sizes(sizes, threads, [&](size_t i, int own_threads) {
    if (ks[i] == 0) return;
    const MaskedLayer& layer = layers_[i];
    updates_[i].explore(layer.explored, own_threads);
    updates_[i].drop_smallest(layer.dtype, layer.weights, ks[i], own_threads);
    grow(i);
    // While what was read of this layer is in the cache.
    changes[i] = updates_[i].apply(layer.dtype, layer.mask, layer.weights, layer.explored);
  });
  return changes;
}

}  // namespace sparseopt::cpu
