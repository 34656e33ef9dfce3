// All that a step depends on, read from Python's objects in one pass: what sparseopt_kernels/snapshot.py does
// in Python, for the tensors and containers that nearly everyone has.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "memory_reader.h"

namespace sparseopt {

// What an optimizer has: its parameter groups and state; the parameters that have the masks, where these may
// change, and the masks.
struct Optimizer {
  pybind11::list groups;
  pybind11::dict state;
  pybind11::list mask_owners, masks;
};

// What is found at the beginning of a step. Bytes are equal where what they were made from is the same.
struct Look {
  std::vector<pybind11::object> gradients;
  std::string layout, addresses;  // of their memory; 8 bytes for each address
  bool any_negated = false;
  std::string groups, masked, stateful, memory;
  std::vector<int64_t> mask_versions, versions;

  // Whether the same step can be made again: of the gradients' addresses it does not depend.
  bool same_step(const Look& other) const {
    return layout == other.layout && groups == other.groups && masked == other.masked &&
           stateful == other.stateful && memory == other.memory && mask_versions == other.mask_versions &&
           versions == other.versions;
  }
};

class StepReader {
 public:
  explicit StepReader(const MemoryReader& memory) : memory_(memory) {}

  // Looks at an optimizer and the gradients of `parameters`; of `watched`, versions are told. False, and no
  // error set, where something is not as expected: it is to be looked at in Python.
  bool look(const Optimizer& optimizer, const pybind11::list& parameters, const pybind11::list& watched,
            Look& found) const;

  // The same for Python: the fields of a Gradients, then those of a Snapshot, then the versions; or None.
  pybind11::object read(const Optimizer& optimizer, const pybind11::list& parameters,
                        const pybind11::list& watched) const;

 private:
  MemoryReader memory_;
};

// Reads the versions of tensors. False, and no error set, where one has none.
bool read_versions(const pybind11::list& tensors, std::vector<int64_t>& versions);

}  // namespace sparseopt
