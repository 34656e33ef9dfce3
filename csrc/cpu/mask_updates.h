// An update of the masks of all layers: which are shared out to threads, and when tensors are written.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "selection.h"

namespace sparseopt::cpu {

struct MaskedLayer {
  Dtype dtype;
  void* weights;
  uint8_t* mask;
  uint8_t* explored;  // one byte for each weight that has been active at some time
  int64_t numel;
  int64_t min_fan_in;
  NeuronGrid neurons;
};

struct Scores {
  size_t layer;
  Dtype dtype;
  const void* values;
  int64_t at_most;  // how many weights may grow by them
};

class MaskUpdates {
 public:
  // Looks at all masks, which stay as they are until weights have grown.
  MaskUpdates(std::vector<MaskedLayer> layers, int threads);
  ~MaskUpdates();
  MaskUpdates(const MaskUpdates&) = delete;

  std::vector<int64_t> active() const;   // of each layer, before the update
  std::vector<int64_t> missing() const;  // of each layer, what its neurons have less than min_fan_in

  // Remembers the largest scores of these layers. Returns whether all scores are finite.
  bool rank(const std::vector<Scores>& scores, int threads);

  // Whether the scores by which weights may grow are 0 wherever a weight is inactive, but not everywhere.
  bool scores_are_masked() const;

  // In each layer, drops k active weights and grows as many, by rank or at random, and writes what changed.
  // A layer whose k is 0 is left alone. Returns how each mask has changed.
  std::vector<MaskChange> grow_largest(const std::vector<int64_t>& ks, int threads);
  std::vector<MaskChange> grow_random(const std::vector<int64_t>& ks, const std::vector<uint64_t>& seeds,
                                      const std::vector<uint64_t>& seeds_of_missing, int threads);

  // Drops without growing.
  std::vector<MaskChange> drop(const std::vector<int64_t>& ks, int threads);

 private:
  void check_missing(const std::vector<int64_t>& ks) const;
  std::vector<MaskChange> replace(const std::vector<int64_t>& ks, int threads,
                                  const std::function<void(size_t)>& grow);

  std::vector<MaskedLayer> layers_;
  std::vector<MaskUpdate> updates_;
};

}  // namespace sparseopt::cpu
