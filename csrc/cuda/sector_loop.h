// The loop over the sectors of many tensors. Warps share out their chunks; each thread of a warp has one
// sector.
#pragma once

#include <cuda_runtime.h>

#include "argument.h"
#include "sectors.h"
#include "threads.h"

namespace sparseopt::cuda {

// The sector of a thread. If no weight of it is active, the thread has none.
struct Sector {
  int32_t tensor;
  uint32_t number;
  unsigned active;
};

// Returns the sector of this thread; none behind the last chunk.
template <int kWeights, class T>
__device__ __forceinline__ Sector sector_of(const SectorArgument<T>& argument, uint32_t chunk) {
  Sector sector{};
  if (chunk >= *argument.chunks) return sector;
  sector.tensor = argument.chunk_to_tensor[chunk];
  const SectorRow& row = argument.table[sector.tensor];
  const uint32_t i = (chunk - static_cast<uint32_t>(row.first_chunk)) * kChunk + threadIdx.x % kWarp;
  if (i >= row.length) return sector;
  const auto* listed = reinterpret_cast<const uint32_t*>(row.listed);
  const auto* bits = reinterpret_cast<const SectorBits<kWeights>*>(row.visited_bits);
  sector.number = listed != nullptr ? __ldg(listed + i) : i;
  sector.active = bits != nullptr ? __ldg(bits + i) : (1u << kWeights) - 1;
  return sector;
}

// Calls visit.read(sector), .update(sector) and .write(sector) for each live sector. The next one is found
// after read(): that takes three dependent loads, while those of read() are under way. A __syncwarp() keeps
// the compiler from holding a tensor's row of the table in registers: each call loads it anew, from the L1
// cache.
template <int kWeights, class T, class Visit>
__device__ __forceinline__ void for_each_sector(const SectorArgument<T>& argument, Visit& visit) {
  uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / kWarp;
  Sector sector = sector_of<kWeights>(argument, chunk);
#pragma unroll 1
  while (chunk < *argument.chunks) {
    if (sector.active != 0) visit.read(sector);
    chunk += gridDim.x * kWarps;
    const Sector next = sector_of<kWeights>(argument, chunk);
    __syncwarp();
    if (sector.active != 0) visit.update(sector);
    __syncwarp();
    if (sector.active != 0) visit.write(sector);
    sector = next;
  }
}

// The c_i of the weights of a sector, row by row.
template <class T>
class SectorFactors {
 public:
  SectorFactors() = default;

  // `begin` is the first weight of the sector. Without correction, there is one row, with c_i = 1.
  __device__ __forceinline__ SectorFactors(const SectorRow& tensor, int64_t begin, unsigned active,
                                           bool wide) {
    if (tensor.factors == 0) return;
    int64_t row, left;
    if (wide) {
      row = begin / tensor.columns;
      left = tensor.columns - (begin - row * tensor.columns);
    } else {
      const auto columns = static_cast<uint32_t>(tensor.columns), first = static_cast<uint32_t>(begin);
      const uint32_t quotient = first / columns;
      row = quotient;
      left = columns - (first - quotient * columns);
    }
    if (left < kWhole) own_ = (1u << left) - 1;
    at_ = reinterpret_cast<const T*>(tensor.factors) + row;
    c_ = __ldg(at_);
    // c_i of a second row is loaded early. Only matrices of few columns have a third one in a sector.
    if ((active & ~own_) != 0) next_ = __ldg(at_ + 1);
  }

  // Calls visit(active, c) for each row, with the bits of its weights.
  template <class Visit>
  __device__ __forceinline__ void for_each(const SectorRow& tensor, unsigned active, Visit&& visit) {
#pragma unroll 1
    for (;;) {
      visit(active & own_, c_);
      active &= ~own_;
      if (active == 0) return;
      const int columns = tensor.columns < kWhole ? static_cast<int>(tensor.columns) : kWhole;
      own_ = own_ << columns | ((1u << columns) - 1);
      c_ = next_;
      ++at_;
      if ((active & ~own_) != 0) next_ = __ldg(at_ + 1);
    }
  }

 private:
  static constexpr int kWhole = 16;  // the most weights of a sector

  unsigned own_ = ~0u;  // bits of the weights up to the end of this row
  const T* at_ = nullptr;
  T c_ = T(1), next_ = T(1);  // of this row and of the next
};

}  // namespace sparseopt::cuda
