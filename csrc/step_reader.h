// All that a step depends on, read from Python's objects in one pass: what sparseopt_kernels/snapshot.py does
// in Python, for the tensors and containers that nearly everyone has.
#pragma once

#include <pybind11/pybind11.h>

#include "memory_reader.h"

namespace sparseopt {

class StepReader {
 public:
  explicit StepReader(const MemoryReader& memory) : memory_(memory) {}

  // `groups` are parameter groups and `state` is that of an optimizer; `mask_owners` are the parameters that
  // have the masks, where these may change; of `watched`, versions are told. Returns the fields of a
  // Gradients, then those of a Snapshot, then the versions. None where something is not as expected: it is to
  // be looked at in Python.
  pybind11::object read(const pybind11::list& groups, const pybind11::dict& state,
                        const pybind11::list& mask_owners, const pybind11::list& masks,
                        const pybind11::list& parameters, const pybind11::list& watched) const;

 private:
  MemoryReader memory_;
};

}  // namespace sparseopt
