#include "step_reader.h"

#include <optional>
#include <string>

namespace py = pybind11;

namespace sparseopt {
namespace {

// Bytes that are equal where what was read is the same. Objects are told apart by their addresses: whoever
// compares keeps them alive.
class Bytes {
 public:
  void add(const void* object) { add_number(reinterpret_cast<uintptr_t>(object)); }
  void add_number(uint64_t number) { bytes_.append(reinterpret_cast<const char*>(&number), sizeof number); }
  void add_objects(const py::list& objects) {
    add_number(objects.size());
    for (const py::handle object : objects) add(object.ptr());
  }
  // False, and no error set, if it is no string.
  bool add_string(py::handle string) {
    Py_ssize_t size = 0;
    const char* at = PyUnicode_Check(string.ptr()) ? PyUnicode_AsUTF8AndSize(string.ptr(), &size) : nullptr;
    if (at == nullptr) {
      PyErr_Clear();
      return false;
    }
    add_number(static_cast<uint64_t>(size));
    bytes_.append(at, static_cast<size_t>(size));
    return true;
  }
  py::bytes taken() const { return py::bytes(bytes_); }

 private:
  std::string bytes_;
};

// Attributes and keys, made into Python strings once.
struct Names {
  py::str params{"params"}, momentum{"momentum"}, dampening{"dampening"}, correction{"correction"},
      momentum_buffer{"momentum_buffer"}, grad{"grad"}, version{"_version"}, is_neg{"is_neg"};
};

const Names& names() {
  static const Names* names = new Names;  // never destroyed: Python may be gone by then
  return *names;
}

py::object attribute(py::handle object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name.ptr()));
}

py::object attribute_called(py::handle object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), name.ptr()));
}

// Whether Python takes it for true; none, and no error set, where it is null or cannot tell.
std::optional<bool> is_true(py::handle object) {
  const int truth = object ? PyObject_IsTrue(object.ptr()) : -1;
  if (truth < 0) PyErr_Clear();
  return truth < 0 ? std::nullopt : std::optional<bool>(truth == 1);
}

bool add_group(Bytes& to, py::handle group) {
  if (!PyDict_Check(group.ptr())) return false;
  PyObject* params = PyDict_GetItemWithError(group.ptr(), names().params.ptr());
  PyObject* correction = PyDict_GetItemWithError(group.ptr(), names().correction.ptr());
  if (params == nullptr || !PyList_Check(params) || correction == nullptr) return false;
  to.add_objects(py::reinterpret_borrow<py::list>(params));
  for (const py::str* name : {&names().momentum, &names().dampening}) {
    const std::optional<bool> truth = is_true(PyDict_GetItemWithError(group.ptr(), name->ptr()));
    if (!truth) return false;
    to.add_number(*truth);
  }
  return to.add_string(correction);
}

bool add_state(Bytes& keys, std::string& memory, const MemoryReader& reader, const py::dict& state) {
  PyObject *key, *own;
  Py_ssize_t position = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &own)) {
    keys.add(key);
    if (!PyDict_Check(own)) continue;  // besides parameters, a state may have keys of the user's
    PyObject* buffer = PyDict_GetItemWithError(own, names().momentum_buffer.ptr());
    if (!reader.append(buffer == nullptr ? Py_None : buffer, memory, memory)) return false;
  }
  return true;
}

// False, and no error set, where one of them has no version.
bool add_versions(const py::list& tensors, py::list& to) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* version =
        PyObject_GetAttr(PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)), names().version.ptr());
    if (version == nullptr) {
      PyErr_Clear();
      return false;
    }
    PyList_SET_ITEM(to.ptr(), static_cast<Py_ssize_t>(i), version);
  }
  return true;
}

}  // namespace

py::object StepReader::read(const py::list& groups, const py::dict& state, const py::list& mask_owners,
                            const py::list& masks, const py::list& parameters,
                            const py::list& watched) const {
  std::string memory, layout, addresses;  // of parameters, buffers and masks; of gradients
  memory.reserve((parameters.size() * 2 + masks.size()) * MemoryReader::kTypicalBytes);
  layout.reserve(parameters.size() * MemoryReader::kTypicalBytes);
  addresses.reserve(parameters.size() * sizeof(uintptr_t));
  py::list gradients(parameters.size());
  bool any_negated = false;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const py::handle parameter = PyList_GET_ITEM(parameters.ptr(), static_cast<Py_ssize_t>(i));
    if (!memory_.append(parameter, memory, memory)) return py::none();  // after that, its type is known
    py::object gradient = attribute(parameter, names().grad);
    if (!gradient || !memory_.append(gradient, layout, addresses)) {
      PyErr_Clear();
      return py::none();
    }
    if (!gradient.is_none()) {
      const std::optional<bool> negated = is_true(attribute_called(gradient, names().is_neg));
      if (!negated) return py::none();
      any_negated |= *negated;
    }
    PyList_SET_ITEM(gradients.ptr(), static_cast<Py_ssize_t>(i), gradient.release().ptr());
  }
  Bytes groups_bytes, owners, keys;
  for (const py::handle group : groups)
    if (!add_group(groups_bytes, group)) return py::none();
  owners.add_objects(mask_owners);
  if (!add_state(keys, memory, memory_, state)) return py::none();
  for (const py::handle mask : masks)
    if (!memory_.append(mask, memory, memory)) return py::none();
  py::list mask_versions(masks.size()), versions(watched.size());
  if (!add_versions(masks, mask_versions) || !add_versions(watched, versions)) return py::none();
  const py::bytes gradients_layout(layout);
  return py::make_tuple(gradients, gradients_layout, py::bytes(addresses), any_negated, groups_bytes.taken(),
                        owners.taken(), keys.taken(), py::bytes(memory), gradients_layout, mask_versions,
                        versions);
}

}  // namespace sparseopt
