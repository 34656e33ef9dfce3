// Dtypes by their names in Python, for the CPU and the CUDA library.
#pragma once

#include <stdexcept>
#include <string>

namespace sparseopt {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("dtype is '" + name + "', it must be float32, float64, bfloat16 or float16");
}

}  // namespace sparseopt
