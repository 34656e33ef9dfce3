// An update of the masks of all layers: shares the layers out to threads, and writes the tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
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
  const void* values;  // their magnitudes are compared
  int64_t at_most;     // how many weights may grow by them
  bool fills;          // whether neurons get the inputs they lack by them
};

// What happens to the mask of a layer: nothing, if both numbers are 0.
struct Change {
  int64_t drop, grow;
  Dtype dtype;
  const void* drop_scores;  // their magnitudes are compared
  // Of random growth: for the inputs that neurons lack, and for all else. Without them, weights grow by rank.
  std::optional<std::pair<uint64_t, uint64_t>> seeds;
};

class DropAndGrow {
 public:
  // Reads all masks, which stay as they are until weights are dropped.
  DropAndGrow(std::vector<MaskedLayer> layers, int threads);
  ~DropAndGrow();
  DropAndGrow(const DropAndGrow&) = delete;

  std::vector<int64_t> active() const;   // of each layer, before the update
  std::vector<int64_t> missing() const;  // of each layer, what its neurons have less than min_fan_in

  // Remembers the largest scores of these layers. Returns whether all scores are finite.
  bool rank(const std::vector<Scores>& scores, int threads);

  // Whether any of the scores by which weights may grow is not 0, at active weights and at inactive ones.
  bool sees_active() const;
  bool sees_inactive() const;

  // In each layer, drops and grows so many weights, and writes what changed. Where neurons need some of those
  // to be dropped, as many fewer grow. Returns how each mask has changed.
  std::vector<LayerUpdate> update(const std::vector<Change>& changes, int threads);

 private:
  std::vector<MaskedLayer> layers_;
  std::vector<Selection> selections_;
};

}  // namespace sparseopt::cpu
