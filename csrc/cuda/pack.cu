// Packing of a boolean mask, once per change of it.
#include "check.h"
#include "shares.h"
#include "table.h"

namespace sparseopt::cuda {
namespace {

struct Packing {
  const uint8_t* mask;
  int64_t rows, columns;
  uint8_t* bits;
  unsigned long long* nnz;
};

// A thread per byte of bits.
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Packing packing) {
  const int64_t row_bytes = bytes_of(packing.columns), bytes = packing.rows * row_bytes;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  unsigned long long count = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) {
    const int64_t row = i / row_bytes, first = (i - row * row_bytes) * kLanes;
    const uint8_t* from = packing.mask + row * packing.columns + first;
    unsigned packed = 0;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      if (first + lane < packing.columns) packed |= unsigned(from[lane] != 0) << lane;
    packing.bits[i] = static_cast<uint8_t>(packed);
    count += static_cast<unsigned>(__popc(packed));
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) count += __shfl_xor_sync(~0u, count, offset);
  if (threadIdx.x % kWarp == 0 && count != 0) atomicAdd(packing.nnz, count);
}

}  // namespace

void pack(uintptr_t mask, int64_t rows, int64_t columns, uintptr_t bits, uintptr_t nnz, uintptr_t stream) {
  check(cudaMemsetAsync(reinterpret_cast<void*>(nnz), 0, sizeof(int64_t),
                        reinterpret_cast<cudaStream_t>(stream)),
        "zeroing the count of a mask");
  if (rows <= 0 || columns <= 0) return;
  const int64_t blocks = blocks_for(rows * bytes_of(columns));
  const Packing packing{reinterpret_cast<const uint8_t*>(mask), rows, columns,
                        reinterpret_cast<uint8_t*>(bits), reinterpret_cast<unsigned long long*>(nnz)};
  launch("launching the packing of a mask", pack_kernel, static_cast<uint32_t>(blocks), kThreads, stream,
         packing);
}

}  // namespace sparseopt::cuda
