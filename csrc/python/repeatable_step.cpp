#include "repeatable_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace py = pybind11;

namespace sparseopt {
namespace {

// Reads a value of a group. Returns false if it is no Python number (a tensor, say).
bool read_number(py::handle group, const py::str& name, double& to) {
  const py::handle value = item(group, name);
  if (!value || !(PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr()))) return false;
  to = PyFloat_AsDouble(value.ptr());
  const bool fits = PyErr_Occurred() == nullptr;
  PyErr_Clear();
  return fits;
}

bool read_bool(py::handle group, const py::str& name, bool& to) {
  const py::handle value = item(group, name);
  to = value.ptr() == Py_True;
  return value && PyBool_Check(value.ptr());
}

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

bool read_limit(py::handle group, double& limit) {
  limit = kNoLimit;
  const Names& key = names();
  if (item(group, key.max_grad_norm).ptr() == Py_None) return true;
  return read_number(group, key.max_grad_norm, limit) && limit > 0;
}

// Reads a group's rule and its limit of the gradient norm. Returns false if Python must read it.
bool read_rule(py::handle group, cpu::Rule& rule, double& limit) {
  const Names& key = names();
  if (!PyDict_Check(group.ptr()) || !read_limit(group, limit)) return false;
  rule.gamma = 1.0;
  return read_number(group, key.lr, rule.lr) && read_number(group, key.momentum, rule.momentum) &&
         read_number(group, key.dampening, rule.dampening) &&
         read_number(group, key.weight_decay, rule.weight_decay) &&
         read_bool(group, key.nesterov, rule.nesterov) && read_bool(group, key.maximize, rule.maximize) &&
         read_number(group, key.ham_alpha, rule.ham_alpha) && read_number(group, key.ham_beta, rule.ham_beta);
}

// The same for all groups: rule i is that of group i. First steps with dampening, which have other rules, are
// not repeated.
bool read_rules(py::handle groups, std::vector<cpu::Rule>& rules, std::vector<double>& limits) {
  if (!PyList_Check(groups.ptr())) return false;
  for (const py::handle group : py::reinterpret_borrow<py::list>(groups)) {
    rules.emplace_back();
    limits.emplace_back();
    if (!read_rule(group, rules.back(), limits.back())) return false;
  }
  return true;
}

// Limits the gradient norm: gamma of rules that have a limit becomes the coefficient of Appendix F.
void limit_norm(const std::vector<cpu::TensorStep>& updates, int threads, bool dense,
                const std::vector<double>& limits, std::vector<cpu::Rule>& rules) {
  const auto is_limit = [](double limit) { return limit != kNoLimit; };
  if (std::none_of(limits.begin(), limits.end(), is_limit)) return;
  const double norm = std::sqrt(cpu::squared_norm(updates, threads, dense));
  for (size_t i = 0; i < rules.size(); ++i) {
    const double ratio = norm / limits[i];
    // std::max(1.0, ratio) would be 1 for a norm that is NaN.
    if (is_limit(limits[i])) rules[i].gamma = 1.0 / (1.0 > ratio ? 1.0 : ratio);
  }
}

}  // namespace

RepeatableStep::RepeatableStep(const StepReader& reader, const cpu::Table& table,
                               std::vector<size_t> positions, Snapshot snapshot,
                               std::vector<int64_t> versions, bool dense_norm)
    : reader_(reader),
      table_(table),
      positions_(std::move(positions)),
      snapshot_(std::move(snapshot)),
      versions_(std::move(versions)),
      dense_norm_(dense_norm) {}

bool RepeatableStep::repeat(const Optimizer& optimizer, const py::list& updated,
                            const py::object& increment_version, int threads) {
  std::vector<cpu::Rule> rules;
  std::vector<double> limits;
  Observed found;
  if (!read_rules(optimizer.groups, rules, limits) || !reader_.observe(optimizer, found) ||
      found.any_negated || !(found.snapshot == snapshot_) || found.versions != versions_ ||
      cpu::any_written(table_, false))
    return false;
  std::vector<const cpu::Rule*> rule_of;
  rule_of.reserve(rules.size());
  for (const cpu::Rule& rule : rules) rule_of.push_back(&rule);
  std::string addresses;
  addresses.reserve(positions_.size() * sizeof(uintptr_t));
  for (size_t position : positions_)
    addresses.append(found.addresses, position * sizeof(uintptr_t), sizeof(uintptr_t));
  const std::vector<cpu::TensorStep> updates = cpu::updates_of(table_, addresses, rule_of);
  // Autograd must notice writes through pointers. They are counted first, so that no interruption leaves one
  // uncounted.
  increment_version(updated);
  {
    py::gil_scoped_release release;
    limit_norm(updates, threads, dense_norm_, limits, rules);
    cpu::step(updates, threads);
  }
  read_versions(optimizer.watched, versions_);
  return true;
}

}  // namespace sparseopt
