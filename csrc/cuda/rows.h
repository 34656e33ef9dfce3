// Which block does what, and the walk over a tensor's mask bytes: rows by warps, parts of warps or blocks,
// which count the fan-in first; a dense tensor as one array.
#pragma once

#include <cuda_runtime.h>

#include "argument.h"
#include "shares.h"

namespace sparseopt::cuda {

// The share of a block: it is number `block` of the `blocks` of one tensor.
struct Share {
  int tensor;
  uint32_t block, blocks;
};

template <class T>
__device__ __forceinline__ Share share_of(const Argument<T>& argument, uint32_t block) {
  int low = 0, high = argument.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (argument.tensors[middle].first_block <= block)
      low = middle;
    else
      high = middle;
  }
  const uint32_t first = argument.tensors[low].first_block;
  const uint32_t end = high < argument.count ? argument.tensors[high].first_block : gridDim.x;
  return {low, block - first, end - first};
}

// The bits of every `stride`-th piece of a row, by words where it is aligned to them.
__device__ __forceinline__ int64_t count_bits(const uint8_t* bits, int64_t bytes, int first, int stride) {
  int64_t count = 0, counted = 0;
  if (reinterpret_cast<uintptr_t>(bits) % sizeof(uint32_t) == 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(bits);
#pragma unroll 1
    for (int64_t i = first; i < bytes / 4; i += stride) count += __popc(words[i]);
    counted = bytes / 4 * 4;
  }
#pragma unroll 1
  for (int64_t i = counted + first; i < bytes; i += stride) count += __popc(bits[i]);
  return count;
}

// The sum over the threads of a row. All threads of the block must come here.
__device__ __forceinline__ int64_t sum_over_row(int64_t value, int row_threads) {
  const int lanes = row_threads < kWarp ? row_threads : kWarp;
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (row_threads <= kWarp) return value;
  __shared__ int64_t of_warp[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) value += of_warp[i];
  __syncthreads();  // before the next row's sums are written
  return value;
}

// Calls visit(offset, count, active, c): the weight where a byte's weights begin, how many of them there
// are, their mask bits and c_i. Bytes without a mask bit are left out. A dense tensor is one row that all
// blocks share.
template <class T, class Visit>
__device__ __forceinline__ void for_each_byte(const TensorArgument& tensor, Correction correction,
                                              Share share, Visit&& visit) {
  const bool dense = tensor.bits == nullptr, corrected = !dense && correction != Correction::kNone;
  const int64_t columns = tensor.columns, bytes = bytes_of(columns);
  T divisor = static_cast<T>(columns);
  if (corrected && correction == Correction::kLayer) divisor = *static_cast<const T*>(tensor.mean_fan_in);

  const int log2 = dense ? kLog2Threads : log2_row_threads(bytes), row_threads = 1 << log2;
  const int thread = static_cast<int>(threadIdx.x) & (row_threads - 1);
  const int64_t block_rows = kThreads >> log2, row_stride = share.blocks * block_rows;
  const int64_t begin = dense ? int64_t(share.block) * kThreads + thread : thread;
  const int64_t stride = dense ? int64_t(share.blocks) * kThreads : row_threads;
  for (int64_t first = dense ? 0 : share.block * block_rows; first < tensor.rows; first += row_stride) {
    const int64_t row = first + (threadIdx.x >> log2);
    const bool inside = row < tensor.rows;
    const uint8_t* bits = tensor.bits + row * bytes;
    T c = T(1);
    if (corrected) {
      const int64_t counted = inside ? count_bits(bits, bytes, thread, row_threads) : 0;
      const int64_t fan_in = sum_over_row(counted, row_threads);
      // An empty row has nothing to correct; in an empty layer there is no mean to divide by.
      c = fan_in == 0 ? T(0) : correction_factor(fan_in, divisor);
    }
    if (!inside) continue;
#pragma unroll 1
    for (int64_t i = begin; i < bytes; i += stride) {
      const unsigned active = dense ? 0xffu : bits[i];
      if (active == 0) continue;
      const int64_t left = columns - i * kLanes;
      visit(row * columns + i * kLanes, left < kLanes ? static_cast<int>(left) : kLanes, active, c);
    }
  }
}

}  // namespace sparseopt::cuda
