// Where tensors lie in memory, asked of PyTorch without its headers: through DLPack's C exchange API, a table
// of functions that the type torch.Tensor refers to. https://dmlc.github.io/dlpack/latest/python_spec.html
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace sparseopt {

struct ExchangeApi;

class MemoryReader {
 public:
  static constexpr size_t kTypicalBytes = 96;  // that are appended for a tensor

  // `exchange_api` is torch.Tensor.__dlpack_c_exchange_api__; `tensor` and `parameter` are the types whose
  // objects it reads.
  MemoryReader(const pybind11::capsule& exchange_api, const pybind11::type& tensor,
               const pybind11::type& parameter);

  // Appends what tells dtype, device, shape and strides of a tensor or None, and its address in 8 bytes.
  // False, and no error set, where it is of another type or DLPack cannot describe it.
  bool append(pybind11::handle tensor, std::string& layout, std::string& addresses) const;

  // Of a list or tuple of tensors and Nones: (layout, addresses). None where one of them cannot be read.
  pybind11::object read(const pybind11::sequence& tensors) const;

 private:
  const ExchangeApi* api_;
  pybind11::type tensor_, parameter_;
};

}  // namespace sparseopt
