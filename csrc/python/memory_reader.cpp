#include "memory_reader.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace py = pybind11;

namespace sparseopt {

// The binary interface of DLPack 1, as far as it is used here. Fields have DLPack's names.
struct Description {  // DLTensor
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Description) == 48 && offsetof(Description, shape) == 24,
              "DLTensor as DLPack's header lays it out");

struct ExchangeApi {  // DLPackExchangeAPI
  uint32_t major, minor;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, Description* to);
  void* current_work_stream;
};
static_assert(offsetof(ExchangeApi, dltensor_from_py_object_no_sync) == 5 * sizeof(void*),
              "DLPackExchangeAPI as DLPack's header lays it out");

namespace {

template <class T>
void append_numbers(std::string& to, const T* values, size_t count) {
  to.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

void append_layout(std::string& to, const Description& of) {
  const int32_t numbers[] = {of.ndim, of.device_type, of.device_id, of.dtype_code, of.dtype_bits};
  append_numbers(to, numbers, 5);
  append_numbers(to, of.shape, static_cast<size_t>(of.ndim));
  append_numbers(to, of.strides, static_cast<size_t>(of.ndim));
}

}  // namespace

MemoryReader::MemoryReader(const py::capsule& exchange_api, const py::type& tensor, const py::type& parameter)
    : api_(static_cast<const ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"))),
      tensor_(tensor),
      parameter_(parameter) {
  if (api_ == nullptr) throw py::error_already_set();
  if (api_->major != 1 || api_->dltensor_from_py_object_no_sync == nullptr) api_ = nullptr;
}

bool MemoryReader::append(py::handle tensor, std::string& layout, std::string& addresses) const {
  uintptr_t address = 0;
  if (tensor.is_none()) {
    const int32_t absent = -1;
    append_numbers(layout, &absent, 1);
  } else {
    const auto* type = reinterpret_cast<const PyObject*>(Py_TYPE(tensor.ptr()));
    if (api_ == nullptr || (type != tensor_.ptr() && type != parameter_.ptr())) return false;
    Description found{};
    if (api_->dltensor_from_py_object_no_sync(tensor.ptr(), &found) != 0) {
      PyErr_Clear();
      return false;
    }
    address = reinterpret_cast<uintptr_t>(found.data) + found.byte_offset;
    append_layout(layout, found);
  }
  append_numbers(addresses, &address, 1);
  return true;
}

py::object MemoryReader::read(const py::sequence& tensors) const {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "not a sequence"));
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
  std::string layout, addresses;
  layout.reserve(count * kTypicalBytes);
  addresses.reserve(count * sizeof(uintptr_t));
  for (size_t i = 0; i < count; ++i)
    if (!append(PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i)), layout, addresses))
      return py::none();
  return py::make_tuple(py::bytes(layout), py::bytes(addresses));
}

}  // namespace sparseopt
