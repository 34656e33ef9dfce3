// Reads all that a step depends on from Python's objects, in one pass, as
// sparseopt_kernels/step/change_detection.py does in Python; but only from plain tensors, lists and dicts.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "memory_reader.h"

namespace sparseopt {

// An optimizer: its parameter groups and state; its masks, and the parameters that have them if that may
// change; and the parameters (each once) and watched tensors that it was last prepared for.
struct Optimizer {
  pybind11::object groups, state;
  pybind11::list mask_owners, masks;
  pybind11::list parameters, watched;
};

// The Snapshot of change_detection.py. Strings are equal if they were made from the same objects.
struct Snapshot {
  std::string groups, masked, stateful, memory, gradients;
  std::vector<int64_t> mask_versions;

  bool operator==(const Snapshot& other) const {
    return groups == other.groups && masked == other.masked && stateful == other.stateful &&
           memory == other.memory && gradients == other.gradients && mask_versions == other.mask_versions;
  }
};

// All that a step depends on, at its beginning.
struct Observed {
  std::vector<pybind11::object> gradients;
  std::string addresses;  // of gradients, 8 bytes each
  bool any_negated = false;
  Snapshot snapshot;
  std::vector<int64_t> versions;  // of watched tensors
};

class StepReader {
 public:
  explicit StepReader(const MemoryReader& memory) : memory_(memory) {}

  // Returns false, with no error set, if something must be read in Python.
  bool observe(const Optimizer& optimizer, Observed& found) const;

  // The same for Python. Returns (gradients, addresses, any_negated, snapshot, versions), or None.
  pybind11::object read(const Optimizer& optimizer) const;

 private:
  MemoryReader memory_;
};

// Keys and attributes as Python strings, which are made once.
struct Names {
  pybind11::str params{"params"}, lr{"lr"}, momentum{"momentum"}, dampening{"dampening"},
      weight_decay{"weight_decay"}, nesterov{"nesterov"}, maximize{"maximize"}, correction{"correction"},
      ham_alpha{"ham_alpha"}, ham_beta{"ham_beta"}, max_grad_norm{"max_grad_norm"},
      max_grad_norm_over{"max_grad_norm_over"}, momentum_buffer{"momentum_buffer"}, grad{"grad"},
      version{"_version"}, is_neg{"is_neg"};
};
const Names& names();

// Returns the value of a key of a dict; null, with no error set, if there is none.
pybind11::handle item(pybind11::handle dict, const pybind11::str& key);

// Reads the versions of tensors. Returns false, with no error set, if one has none.
bool read_versions(const pybind11::list& tensors, std::vector<int64_t>& versions);

}  // namespace sparseopt
