// Errors of the CUDA runtime as exceptions that name them.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sparseopt::cuda {

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or another library's next call reports it
  throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + " (" +
                           doing + ")");
}

template <class Argument>
void launch(const char* doing, void (*kernel)(Argument), int64_t blocks, int threads, uintptr_t stream,
            const Argument& argument) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, argument), doing);
}

}  // namespace sparseopt::cuda
