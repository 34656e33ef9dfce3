// Reads the memory of tensors without PyTorch's headers: through DLPack's C exchange API, a table of
// functions that the type torch.Tensor refers to. https://dmlc.github.io/dlpack/latest/python_spec.html
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace sparseopt {

struct ExchangeApi;

class MemoryReader {
 public:
  static constexpr size_t kTypicalBytes = 96;  // appended for a tensor

  // `exchange_api` is torch.Tensor.__dlpack_c_exchange_api__. Only objects of the types `tensor` and
  // `parameter` are read.
  MemoryReader(const pybind11::capsule& exchange_api, const pybind11::type& tensor,
               const pybind11::type& parameter);

  // Appends dtype, device, shape and strides of a tensor or None to `layout`, and its address to `addresses`,
  // in 8 bytes. Returns false, with no error set, if it has another type or DLPack cannot describe it.
  bool append(pybind11::handle tensor, std::string& layout, std::string& addresses) const;

  // Returns (layout, addresses) of a list or tuple of tensors and Nones; None if one of them cannot be read.
  pybind11::object read(const pybind11::sequence& tensors) const;

 private:
  const ExchangeApi* api_;
  pybind11::type tensor_, parameter_;
};

}  // namespace sparseopt
