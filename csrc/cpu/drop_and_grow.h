// An update of the masks of all layers: shares the layers out to threads, and writes the tensors.
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
  const void* values;  // their magnitudes are compared
  int64_t at_most;     // how many weights may grow by them; of drop scores, not used
  bool fills;          // whether neurons get the inputs they lack by them; of drop scores, not used
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

  // Ranks the weights of these layers by scores, not by their own magnitudes, when they are dropped.
  void drop_by(const std::vector<Scores>& scores);

  // Whether the scores by which weights may grow are 0 wherever a weight is inactive, but not everywhere.
  bool scores_are_masked() const;

  // In each layer, drops and grows so many weights, by rank or at random, and writes what changed. Where
  // neurons need some of those to be dropped, as many fewer grow. A layer without either is left alone.
  // Returns how each mask has changed.
  std::vector<LayerUpdate> grow_largest(const std::vector<int64_t>& drops, const std::vector<int64_t>& grows,
                                        int threads);
  std::vector<LayerUpdate> grow_random(const std::vector<int64_t>& drops, const std::vector<int64_t>& grows,
                                       const std::vector<uint64_t>& seeds,
                                       const std::vector<uint64_t>& seeds_of_missing, int threads);

  // Drops without growing.
  std::vector<LayerUpdate> drop(const std::vector<int64_t>& drops, int threads);

 private:
  void check_missing(const std::vector<int64_t>& drops, const std::vector<int64_t>& grows) const;
  std::vector<LayerUpdate> replace(const std::vector<int64_t>& drops, const std::vector<int64_t>& grows,
                                   int threads, const std::function<void(size_t)>& grow);

  std::vector<MaskedLayer> layers_;
  std::vector<Scores> drop_scores_;  // of each layer
  std::vector<Selection> selections_;
};

}  // namespace sparseopt::cpu
