// A step that is ready to be made again, as long as nothing has changed but numbers: looking at what it
// depends on, hyperparameters, update, all in one call. Most steps of a training on a CPU are such.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/table.h"
#include "step_reader.h"

namespace sparseopt {

class ReadyStep {
 public:
  // After a step that updated the tensors of `table`; `positions` are those of their gradients among those of
  // `parameters`, and `watched` is what else the step depends on. `increment_version` is called with
  // `updated` after each step that is made here.
  ReadyStep(const StepReader& reader, const cpu::Table& table, std::vector<size_t> positions,
            pybind11::list parameters, pybind11::list watched, pybind11::list updated,
            pybind11::object increment_version);

  // Takes the state in which the optimizer is now for the one in which the step can be made again. False if
  // something is not as expected.
  bool remember(const Optimizer& optimizer);

  // Makes a step. False, and nothing has happened, if it is not the same step any more, or needs what is not
  // known here: it is to be made in Python.
  bool make(const Optimizer& optimizer, int threads);

  // Of what is watched, after the last step.
  const std::vector<int64_t>& versions() const { return last_.versions; }

 private:
  StepReader reader_;
  const cpu::Table& table_;
  std::vector<size_t> positions_;
  pybind11::list parameters_, watched_, updated_;
  pybind11::object increment_version_;
  Look last_;
};

}  // namespace sparseopt
