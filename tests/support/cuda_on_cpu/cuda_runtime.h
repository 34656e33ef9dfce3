// A stand-in for the CUDA runtime, with which csrc/cuda/*.cu compile as C++ and run on the CPU: as much of
// it as they use. Blocks run one after another, the threads of a block as fibres that change places at
// barriers and warp intrinsics (runtime.cpp). What a GPU would leave undefined is an error here: a barrier
// or an intrinsic that some threads do not reach, an address that is not aligned.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static  // blocks do not run at the same time
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct dim3 {
  unsigned x, y, z;
  explicit constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);

using cudaStream_t = struct CudaStream*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

// A place in the source: where a thread waits, and what for.
struct Site {
  const char* what;
  int line;
};

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void barrier(Site site);
// Waits for all lanes in `mask`, then returns what lane `source` gave.
uint64_t exchange(Site site, unsigned mask, uint64_t value, int source);
// The lanes in `mask` whose predicate is true.
unsigned vote(Site site, unsigned mask, bool predicate);
int lane();

template <class T>
T shuffle(Site site, unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA has no shuffle of this size");
  // Beyond its part of the warp, a lane gets its own value.
  const int start = lane() / width * width;
  if (source < start || source >= start + width) source = lane();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(site, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more arguments than every GPU takes");
  return cuda_on_cpu::run(*config, [&] { kernel(arguments...); });
}

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier({"__syncthreads", line}); }

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  cuda_on_cpu::vote({"__syncwarp", line}, mask, false);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::vote({"__ballot_sync", line}, mask, predicate != 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, int line = __builtin_LINE()) {
  const int start = cuda_on_cpu::lane() / width * width;
  return cuda_on_cpu::shuffle({"__shfl_sync", line}, mask, value, start + source % width, width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle({"__shfl_xor_sync", line}, mask, value, cuda_on_cpu::lane() ^ lanes, width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = warpSize, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle({"__shfl_down_sync", line}, mask, value, cuda_on_cpu::lane() + lanes, width);
}

template <class T>
inline T __ldg(const T* from) {
  return *from;
}
template <class T>
inline T __ldcs(const T* from) {
  return *from;
}
template <class T>
inline void __stcs(T* to, T value) {
  *to = value;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
