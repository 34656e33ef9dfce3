// As much of the CUDA runtime as the host code of csrc/cuda calls. A launch is handed to `ptx_on_launch`,
// with what a GPU would get and the name of the kernel.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

using OnLaunch = int (*)(uintptr_t kernel, const unsigned* grid, const unsigned* block, unsigned shared,
                         uintptr_t stream, void** arguments);

EXPORT OnLaunch ptx_on_launch;  // set before the first launch
OnLaunch ptx_on_launch = nullptr;

EXPORT char ptx_error[4096];  // what an error was
char ptx_error[4096] = "";

namespace {

// The names of kernels by the functions of the host that stand for them.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> known;
  return known;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host_function] = name;
}

// Of launches by <<<>>>, of which there are none.
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const unsigned grid[] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned block[] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  const int error = ptx_on_launch(reinterpret_cast<uintptr_t>(kernels().at(function).c_str()), grid, block,
                                  static_cast<unsigned>(config->dynamicSmemBytes),
                                  reinterpret_cast<uintptr_t>(config->stream), arguments);
  return static_cast<cudaError_t>(error);
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "an error of the executed kernel"; }
const char* cudaGetErrorString(cudaError_t) { return ptx_error; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

}  // extern "C"
