// Where tensors lie in memory, asked of PyTorch without its headers: through DLPack's C exchange API, a table
// of functions that the type torch.Tensor refers to. https://dmlc.github.io/dlpack/latest/python_spec.html
#pragma once

#include <pybind11/pybind11.h>

namespace sparseopt {

struct ExchangeApi;

class MemoryReader {
 public:
  // `exchange_api` is torch.Tensor.__dlpack_c_exchange_api__; `tensor` and `parameter` are the types whose
  // objects it reads.
  MemoryReader(const pybind11::capsule& exchange_api, const pybind11::type& tensor,
               const pybind11::type& parameter);

  // Of tensors and Nones: (bytes that tell dtypes, devices, shapes and strides, bytes of 8 for each
  // address). None if one of them is of another type, or DLPack cannot describe it.
  pybind11::object read(const pybind11::sequence& tensors) const;

 private:
  const ExchangeApi* api_;
  pybind11::type tensor_, parameter_;
};

}  // namespace sparseopt
