// The lists of new masks: the bits of each sector, the fan-in of each row, and the live sectors in order. A
// warp has a row, and the sectors that begin in it. Rows are counted before sectors are listed, so that the
// place of each in the list is known, and the same in every run.
#include "../dtypes.h"
#include "check.h"
#include "launches.h"
#include "mask_bits.h"
#include "sectors.h"
#include "tables.h"
#include "threads.h"

namespace sparseopt::cuda {
namespace {

struct ListArgument {
  const ListRow* table;
  const int32_t* block_to_tensor;
  int32_t* fan_in;
  int32_t* live;
  const int64_t* ends;
};

// The row of a mask that this warp has.
template <int kWeights>
struct OwnRow {
  ListRow tensor;
  int64_t row, begin, end;
  int64_t first, last;  // the sectors that begin in it: [first, last)

  __device__ __forceinline__ explicit OwnRow(const ListArgument& argument)
      : tensor(argument.table[argument.block_to_tensor[blockIdx.x]]) {
    row = (int64_t(blockIdx.x) - tensor.first_program) * kWarps + threadIdx.x / kWarp;
    begin = row * tensor.columns;
    end = begin + tensor.columns;
    first = (begin + kWeights - 1) / kWeights;
    last = (end + kWeights - 1) / kWeights;
  }

  __device__ __forceinline__ bool is_inside() const { return row < tensor.rows; }

  // Returns its number among the rows of all tensors.
  __device__ __forceinline__ int64_t number() const { return tensor.first_row + row; }
};

__device__ __forceinline__ int sum_over_warp(int value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Writes the bits of all sectors and, for each row, the numbers of active weights and of live sectors.
template <int kWeights>
__global__ void __launch_bounds__(kThreads) count_rows_kernel(const __grid_constant__ ListArgument argument) {
  using Access = std::conditional_t<kWeights == 4, uint32_t, uint64_t>;
  const OwnRow<kWeights> own(argument);
  if (!own.is_inside()) return;
  const auto* mask = reinterpret_cast<const uint8_t*>(own.tensor.mask);
  auto* to_bits = reinterpret_cast<SectorBits<kWeights>*>(own.tensor.mask_bits);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  // The weights before the first sector that begins in the row.
  const int64_t early = own.begin + lane;
  int active = early < own.first * kWeights && early < own.end && __ldg(mask + early) != 0;
  int live = 0;
  for (int64_t sector = own.first + lane; sector < own.last; sector += kWarp) {
    const int64_t e = sector * kWeights, there = own.tensor.elements - e, of_row = own.end - e;
    const unsigned bits =
        mask_bits<kWeights, Access>(mask + e, there < kWeights ? static_cast<int>(there) : kWeights);
    to_bits[sector] = static_cast<SectorBits<kWeights>>(bits);
    live += bits != 0;
    active += __popc(of_row < kWeights ? bits & ((1u << of_row) - 1) : bits);
  }
  active = sum_over_warp(active);
  live = sum_over_warp(live);
  if (lane == 0) {
    argument.fan_in[own.number()] = active;
    argument.live[own.number()] = live;
  }
}

// Writes the live sectors of each row into the list of the tensor, while there is room.
template <int kWeights>
__global__ void __launch_bounds__(kThreads)
    list_sectors_kernel(const __grid_constant__ ListArgument argument) {
  const OwnRow<kWeights> own(argument);
  if (!own.is_inside()) return;
  const ListRow& tensor = own.tensor;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  // `ends` is the inclusive cumulative sum of `live`, over the rows of all tensors.
  const int64_t before = tensor.first_row > 0 ? argument.ends[tensor.first_row - 1] : 0;
  int64_t place = argument.ends[own.number()] - argument.live[own.number()] - before;
  const auto* all_bits = reinterpret_cast<const SectorBits<kWeights>*>(tensor.mask_bits);
  auto* listed = reinterpret_cast<int32_t*>(tensor.listed);
  auto* to_bits = reinterpret_cast<SectorBits<kWeights>*>(tensor.listed_bits);
  for (int64_t first = own.first; first < own.last; first += kWarp) {
    const int64_t sector = first + lane;
    const SectorBits<kWeights> bits = sector < own.last ? __ldg(all_bits + sector) : SectorBits<kWeights>(0);
    const unsigned is_live = __ballot_sync(~0u, bits != 0);
    const int64_t position = place + __popc(is_live & ((1u << lane) - 1));
    if (bits != 0 && position < tensor.capacity) {
      listed[position] = static_cast<int32_t>(sector);
      to_bits[position] = bits;
    }
    place += __popc(is_live);
  }
}

ListArgument argument_of(const Listing& listing, uintptr_t ends) {
  return {reinterpret_cast<const ListRow*>(listing.table),
          reinterpret_cast<const int32_t*>(listing.block_to_tensor),
          reinterpret_cast<int32_t*>(listing.fan_in), reinterpret_cast<int32_t*>(listing.live),
          reinterpret_cast<const int64_t*>(ends)};
}

}  // namespace

// Kernels depend on the size of a weight alone: both types of half precision have the same.
void count_rows(const Listing& of, uintptr_t stream) {
  with_stored(of.dtype, [&](auto stored) {
    launch("launching the count of masks", count_rows_kernel<kSectorWeights<decltype(stored)>>, of.blocks,
           kThreads, stream, argument_of(of, 0));
  });
}

void list_sectors(const Listing& of, uintptr_t ends, uintptr_t stream) {
  with_stored(of.dtype, [&](auto stored) {
    launch("launching the listing of sectors", list_sectors_kernel<kSectorWeights<decltype(stored)>>,
           of.blocks, kThreads, stream, argument_of(of, ends));
  });
}

}  // namespace sparseopt::cuda
