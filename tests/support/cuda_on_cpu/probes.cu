// Small kernels that test the stand-in: what each of its functions must do, and what it must refuse.
#include <cuda_runtime.h>

#include <cstring>
#include <exception>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

// Each thread of every block writes its number, waits, and reads that of the thread opposite.
__global__ void reverse_through_shared_memory(int* out) {
  __shared__ int numbers[256];
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  numbers[threadIdx.x] = -1;
}

__global__ void without_a_barrier(int* out) {
  __shared__ int numbers[256];
  numbers[threadIdx.x] = static_cast<int>(blockIdx.x + 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_sum(int* out) {
  long long value = static_cast<long long>(threadIdx.x) << 33;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  out[threadIdx.x] = static_cast<int>(value >> 33);
}

__global__ void shuffle_within_width(int* out) {
  const int number = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = __shfl_sync(~0u, number, 1, 8);
  out[blockDim.x + threadIdx.x] = __shfl_down_sync(~0u, number, 3, 8);
}

__global__ void ballot_of_odd_lanes(int* out) {
  out[threadIdx.x] = static_cast<int>(__ballot_sync(~0u, threadIdx.x % 2));
}

__global__ void barrier_of_half_a_block(int* out) {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(int* out) {
  if (threadIdx.x < blockDim.x / 2)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_of_half_a_warp(int* out) {
  const int number = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, number, 1);
}

__global__ void two_intrinsics(int* out) {
  if (threadIdx.x % 2 == 0)
    out[threadIdx.x] = static_cast<int>(__ballot_sync(~0u, 1));
  else
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

__global__ void vector_at_an_odd_address(int* out) {
  *reinterpret_cast<uint4*>(out + 1 + threadIdx.x * 4) = uint4{1, 2, 3, 4};
}

using Kernel = void (*)(int*);
struct Probe {
  const char* name;
  Kernel kernel;
};
#define PROBE(name) {#name, name}
const Probe kProbes[] = {PROBE(reverse_through_shared_memory),
                         PROBE(without_a_barrier),
                         PROBE(warp_sum),
                         PROBE(shuffle_within_width),
                         PROBE(ballot_of_odd_lanes),
                         PROBE(barrier_of_half_a_block),
                         PROBE(two_barriers),
                         PROBE(shuffle_of_half_a_warp),
                         PROBE(two_intrinsics),
                         PROBE(vector_at_an_odd_address)};

}  // namespace

// Runs a kernel; returns the error, or what the stand-in refused.
EXPORTED const char* run_probe(const char* name, unsigned blocks, unsigned threads, int* out) {
  static std::string message;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  for (const Probe& probe : kProbes)
    if (std::strcmp(probe.name, name) == 0) try {
        const cudaError_t error = cudaLaunchKernelEx(&config, probe.kernel, out);
        return cudaGetErrorName(error);
      } catch (const std::exception& failure) {
        message = failure.what();
        return message.c_str();
      }
  return "no such probe";
}
