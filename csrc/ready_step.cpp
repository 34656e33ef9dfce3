#include "ready_step.h"

#include <string>
#include <utility>

namespace py = pybind11;

namespace sparseopt {
namespace {

// The value of a group, where it is a plain number: a tensor, say, is not.
bool read_number(py::handle group, const char* name, double& to) {
  PyObject* value = PyDict_GetItemString(group.ptr(), name);
  if (value == nullptr || !(PyFloat_CheckExact(value) || PyLong_CheckExact(value))) return false;
  to = PyFloat_AsDouble(value);
  const bool fits = !PyErr_Occurred();
  PyErr_Clear();
  return fits;
}

bool read_bool(py::handle group, const char* name, bool& to) {
  PyObject* value = PyDict_GetItemString(group.ptr(), name);
  to = value == Py_True;
  return value != nullptr && PyBool_Check(value);
}

// The rule of a group; sets `is_auto` where layers decide on the correction. False if it is not as simple as
// it mostly is.
bool read_rule(py::handle group, cpu::Rule& rule, bool& is_auto) {
  if (PyDict_GetItemString(group.ptr(), "max_grad_norm") != Py_None) return false;
  const auto correction = py::cast<std::string>(PyDict_GetItemString(group.ptr(), "correction"));
  is_auto |= correction == "auto";
  rule.correction = correction == "auto" ? Correction::kLayer : correction_named(correction);
  rule.gamma = 1.0;
  return read_number(group, "lr", rule.lr) && read_number(group, "momentum", rule.momentum) &&
         read_number(group, "dampening", rule.dampening) &&
         read_number(group, "weight_decay", rule.weight_decay) &&
         read_bool(group, "nesterov", rule.nesterov) && read_bool(group, "maximize", rule.maximize) &&
         read_number(group, "ham_alpha", rule.ham_alpha) && read_number(group, "ham_beta", rule.ham_beta);
}

// Those of all groups; once more without a correction, where layers decide.
bool read_rules(const py::list& groups, std::vector<cpu::Rule>& rules) {
  bool has_auto = false;
  rules.reserve(2 * groups.size());
  for (const py::handle group : groups) {
    rules.emplace_back();
    if (!read_rule(group, rules.back(), has_auto)) return false;
  }
  if (!has_auto) return true;
  for (size_t i = 0; i < groups.size(); ++i) {
    rules.push_back(rules[i]);
    rules.back().correction = Correction::kNone;
  }
  return true;
}

}  // namespace

ReadyStep::ReadyStep(const StepReader& reader, const cpu::Table& table, std::vector<size_t> positions,
                     py::list parameters, py::list watched, py::list updated, py::object increment_version)
    : reader_(reader),
      table_(table),
      positions_(std::move(positions)),
      parameters_(std::move(parameters)),
      watched_(std::move(watched)),
      updated_(std::move(updated)),
      increment_version_(std::move(increment_version)) {}

bool ReadyStep::remember(const Optimizer& optimizer) {
  const bool is_known = reader_.look(optimizer, parameters_, watched_, last_);
  last_.gradients.clear();  // nobody else may need them any more
  return is_known;
}

bool ReadyStep::make(const Optimizer& optimizer, int threads) {
  Look found;
  std::vector<cpu::Rule> rules;
  if (!reader_.look(optimizer, parameters_, watched_, found) || found.any_negated ||
      !found.same_step(last_) || !read_rules(optimizer.groups, rules))
    return false;
  std::vector<const cpu::Rule*> rule_of;
  rule_of.reserve(rules.size());
  for (const cpu::Rule& rule : rules) rule_of.push_back(&rule);
  std::string addresses;
  addresses.reserve(positions_.size() * sizeof(uintptr_t));
  for (size_t position : positions_)
    addresses.append(found.addresses, position * sizeof(uintptr_t), sizeof(uintptr_t));
  const std::vector<cpu::Update> updates = cpu::updates_of(table_, addresses, rule_of);
  {
    py::gil_scoped_release release;
    cpu::step(updates, threads);
  }
  // Kernels write through pointers: autograd must still notice a weight that changed under it.
  increment_version_(updated_);
  read_versions(watched_, last_.versions);
  return true;
}

}  // namespace sparseopt
