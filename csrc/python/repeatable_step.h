// A step that can be repeated as long as only numbers have changed. One call reads what it depends on and the
// hyperparameters, and updates the weights. Most steps of a training on a CPU are repeated.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../cpu/table.h"
#include "step_reader.h"

namespace sparseopt {

// It holds no reference to the optimizer, because Python's garbage collector would not see the cycle.
class RepeatableStep {
 public:
  // For a step that has been made: it updated the tensors of `table`, at `positions` among the optimizer's
  // parameters, depends on `snapshot`, and left the watched tensors with `versions`. `dense_norm`: if the
  // norm of gradients is limited, it is taken over all positions.
  RepeatableStep(const StepReader& reader, const cpu::Table& table, std::vector<size_t> positions,
                 Snapshot snapshot, std::vector<int64_t> versions, bool dense_norm);

  // Calls `increment_version` with `updated`, and makes the step again. Returns false, and changes nothing,
  // if anything but numbers has changed or a rule cannot be read here: the step must be made in Python.
  bool repeat(const Optimizer& optimizer, const pybind11::list& updated,
              const pybind11::object& increment_version, int threads);

  // Returns the versions of the watched tensors after the last step.
  const std::vector<int64_t>& versions() const { return versions_; }

 private:
  StepReader reader_;
  const cpu::Table& table_;
  std::vector<size_t> positions_;
  Snapshot snapshot_;
  std::vector<int64_t> versions_;
  bool dense_norm_;
};

}  // namespace sparseopt
