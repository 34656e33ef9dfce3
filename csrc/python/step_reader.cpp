#include "step_reader.h"

#include <pybind11/stl.h>

#include <optional>
#include <utility>

namespace py = pybind11;

namespace sparseopt {
namespace {

void add_number(std::string& to, uint64_t number) {
  to.append(reinterpret_cast<const char*>(&number), sizeof number);
}

// Objects are compared by their addresses. The caller must keep them alive.
void add_object(std::string& to, py::handle object) {
  add_number(to, reinterpret_cast<uintptr_t>(object.ptr()));
}

void add_objects(std::string& to, const py::list& objects) {
  add_number(to, objects.size());
  for (const py::handle object : objects) add_object(to, object);
}

// Returns false, with no error set, if it is no string.
bool add_string(std::string& to, py::handle string) {
  Py_ssize_t size = 0;
  const char* at = PyUnicode_Check(string.ptr()) ? PyUnicode_AsUTF8AndSize(string.ptr(), &size) : nullptr;
  if (at == nullptr) {
    PyErr_Clear();
    return false;
  }
  add_number(to, static_cast<uint64_t>(size));
  to.append(at, static_cast<size_t>(size));
  return true;
}

py::object attribute(py::handle object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name.ptr()));
}

py::object attribute_called(py::handle object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), name.ptr()));
}

// Returns the truth value of a Python object; none, with no error set, if it is null or has none.
std::optional<bool> is_true(py::handle object) {
  const int truth = object ? PyObject_IsTrue(object.ptr()) : -1;
  if (truth < 0) PyErr_Clear();
  return truth < 0 ? std::nullopt : std::optional<bool>(truth == 1);
}

bool add_group(std::string& to, py::handle group) {
  if (!PyDict_Check(group.ptr())) return false;
  const py::handle params = item(group, names().params), correction = item(group, names().correction),
                   norm_over = item(group, names().max_grad_norm_over);
  if (!params || !PyList_Check(params.ptr()) || !correction || !norm_over) return false;
  add_objects(to, py::reinterpret_borrow<py::list>(params));
  for (const py::str* name : {&names().momentum, &names().dampening}) {
    const std::optional<bool> truth = is_true(item(group, *name));
    if (!truth) return false;
    add_number(to, *truth);
  }
  return add_string(to, correction) && add_string(to, norm_over);
}

bool add_state(std::string& keys, std::string& memory, const MemoryReader& reader, py::handle state) {
  PyObject *key, *own;
  Py_ssize_t position = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &own)) {
    add_object(keys, key);
    if (!PyDict_Check(own)) continue;  // a user's own key, beside those of parameters
    const py::handle buffer = item(own, names().momentum_buffer);
    if (!reader.append(buffer ? buffer : py::handle(Py_None), memory, memory)) return false;
  }
  return true;
}

}  // namespace

const Names& names() {
  static const Names* names = new Names;  // never destroyed, because Python may end first
  return *names;
}

py::handle item(py::handle dict, const py::str& key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr) PyErr_Clear();
  return value;
}

bool read_versions(const py::list& tensors, std::vector<int64_t>& versions) {
  versions.clear();
  versions.reserve(tensors.size());
  for (const py::handle tensor : tensors) {
    const py::object version = attribute(tensor, names().version);
    versions.push_back(version ? PyLong_AsLongLong(version.ptr()) : -1);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

bool StepReader::observe(const Optimizer& optimizer, Observed& found) const {
  Snapshot& snapshot = found.snapshot;
  if (!PyList_Check(optimizer.groups.ptr()) || !PyDict_Check(optimizer.state.ptr())) return false;
  const size_t count = optimizer.parameters.size();
  snapshot.memory.reserve((2 * count + optimizer.masks.size()) * MemoryReader::kTypicalBytes);
  snapshot.gradients.reserve(count * MemoryReader::kTypicalBytes);
  found.addresses.reserve(count * sizeof(uintptr_t));
  found.gradients.reserve(count);
  for (const py::handle parameter : optimizer.parameters) {
    if (!memory_.append(parameter, snapshot.memory, snapshot.memory)) return false;  // of an unknown type
    py::object gradient = attribute(parameter, names().grad);
    if (!gradient || !memory_.append(gradient, snapshot.gradients, found.addresses)) {
      PyErr_Clear();
      return false;
    }
    if (!gradient.is_none()) {
      const std::optional<bool> negated = is_true(attribute_called(gradient, names().is_neg));
      if (!negated) return false;
      found.any_negated |= *negated;
    }
    found.gradients.push_back(std::move(gradient));
  }
  for (const py::handle group : py::reinterpret_borrow<py::list>(optimizer.groups))
    if (!add_group(snapshot.groups, group)) return false;
  add_objects(snapshot.masked, optimizer.mask_owners);
  if (!add_state(snapshot.stateful, snapshot.memory, memory_, optimizer.state)) return false;
  for (const py::handle mask : optimizer.masks)
    if (!memory_.append(mask, snapshot.memory, snapshot.memory)) return false;
  return read_versions(optimizer.masks, snapshot.mask_versions) &&
         read_versions(optimizer.watched, found.versions);
}

py::object StepReader::read(const Optimizer& optimizer) const {
  Observed found;
  if (!observe(optimizer, found)) return py::none();
  return py::make_tuple(found.gradients, py::bytes(found.addresses), found.any_negated,
                        std::move(found.snapshot), found.versions);
}

}  // namespace sparseopt
