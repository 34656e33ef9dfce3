// All that a step depends on, read from Python's objects in one pass: what
// sparseopt_kernels/step/change_detection.py does in Python, for the tensors and containers that nearly
// everyone has.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "memory_reader.h"

namespace sparseopt {

// What an optimizer has: its parameter groups and state; the parameters that have the masks, where these may
// change, and the masks. Then what it was last prepared for: its parameters, each once, and tensors whose
// values matter, besides the masks.
struct Optimizer {
  pybind11::object groups, state;
  pybind11::list mask_owners, masks;
  pybind11::list parameters, watched;
};

// The Snapshot of change_detection.py. Bytes are equal where what they were made from is the same.
struct Snapshot {
  std::string groups, masked, stateful, memory, gradients;
  std::vector<int64_t> mask_versions;

  bool operator==(const Snapshot& other) const {
    return groups == other.groups && masked == other.masked && stateful == other.stateful &&
           memory == other.memory && gradients == other.gradients && mask_versions == other.mask_versions;
  }
};

// The state of everything at the beginning of a step.
struct Observed {
  std::vector<pybind11::object> gradients;
  std::string addresses;  // of the gradients' memory, 8 bytes each
  bool any_negated = false;
  Snapshot snapshot;
  std::vector<int64_t> versions;  // of what is watched
};

class StepReader {
 public:
  explicit StepReader(const MemoryReader& memory) : memory_(memory) {}

  // False, and no error set, where something is not as expected: it is to be read in Python.
  bool observe(const Optimizer& optimizer, Observed& found) const;

  // The same for Python: (gradients, addresses, any_negated, snapshot, versions), or None.
  pybind11::object read(const Optimizer& optimizer) const;

 private:
  MemoryReader memory_;
};

// A key or attribute, made into a Python string once.
struct Names {
  pybind11::str params{"params"}, lr{"lr"}, momentum{"momentum"}, dampening{"dampening"},
      weight_decay{"weight_decay"}, nesterov{"nesterov"}, maximize{"maximize"}, correction{"correction"},
      ham_alpha{"ham_alpha"}, ham_beta{"ham_beta"}, max_grad_norm{"max_grad_norm"},
      max_grad_norm_over{"max_grad_norm_over"}, momentum_buffer{"momentum_buffer"}, grad{"grad"},
      version{"_version"}, is_neg{"is_neg"};
};
const Names& names();

// The value of a key of a dict; null, and no error set, where there is none.
pybind11::handle item(pybind11::handle dict, const pybind11::str& key);

// Reads the versions of tensors. False, and no error set, where one has none.
bool read_versions(const pybind11::list& tensors, std::vector<int64_t>& versions);

}  // namespace sparseopt
