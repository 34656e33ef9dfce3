// An update of the masks of all layers, which threads share out.
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
  uint8_t* explored;  // one byte per weight: 1 if it has been active at some time
  int64_t numel;
  int64_t min_fan_in;
  NeuronGrid neurons;
};

struct Scores {
  size_t layer;
  Dtype dtype;
  const void* values;  // their magnitudes are compared
  int64_t at_most;     // weights that may grow by them
  bool fills;          // they choose the inputs that neurons lack, too
};

// The numbers of weights that a layer drops and grows. If both are 0, nothing is done.
struct Change {
  int64_t drop, grow;
  Dtype dtype;
  const void* drop_scores;  // their magnitudes are compared
  // Seeds of random growth: one for the inputs that neurons lack, one for the rest. None: growth by rank.
  std::optional<std::pair<uint64_t, uint64_t>> seeds;
};

class DropAndGrow {
 public:
  // Reads all masks, which stay as they are until weights are dropped.
  DropAndGrow(std::vector<MaskedLayer> layers, int threads);
  ~DropAndGrow();
  DropAndGrow(const DropAndGrow&) = delete;

  std::vector<int64_t> active() const;   // weights of each layer, before the update
  std::vector<int64_t> missing() const;  // inputs that the neurons of each layer lack

  // Remembers the largest scores of these layers. Returns true if all scores are finite.
  bool rank(const std::vector<Scores>& scores, int threads);

  // True if rank() saw a score other than 0 by which weights may grow, of an active (inactive) weight.
  bool sees_active() const;
  bool sees_inactive() const;

  // Drops and grows weights in each layer, and writes its tensors. If neurons need weights that were to drop,
  // as many fewer drop and grow. Returns how each mask has changed.
  std::vector<LayerUpdate> update(const std::vector<Change>& changes, int threads);

 private:
  std::vector<MaskedLayer> layers_;
  std::vector<Selection> selections_;
};

}  // namespace sparseopt::cpu
