// A step that can be repeated, as long as nothing has changed but numbers: what it depends on is read,
// hyperparameters are, and the weights are updated, all in one call. Most steps of a training on a CPU are
// such.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../cpu/table.h"
#include "step_reader.h"

namespace sparseopt {

// It holds nothing that may refer back to the optimizer: Python's garbage collector does not see into it.
class RepeatableStep {
 public:
  // A step was made that updated the tensors of `table`, depends on `snapshot`, and left what is watched with
  // `versions`. `positions` are those of the tensors among the optimizer's parameters. `dense_norm`: of the
  // gradients, where their norm is limited, all positions count.
  RepeatableStep(const StepReader& reader, const cpu::Table& table, std::vector<size_t> positions,
                 Snapshot snapshot, std::vector<int64_t> versions, bool dense_norm);

  // Calls `increment_version` with `updated`, and makes the step again. False, and nothing has happened, if
  // it is not the same step any more, or needs what is not known here: it is to be made in Python.
  bool repeat(const Optimizer& optimizer, const pybind11::list& updated,
              const pybind11::object& increment_version, int threads);

  // The versions of the watched tensors after the last step.
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
