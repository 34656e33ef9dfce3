// The sum of (c_i * g)^2 over the active weights, as one partial sum per block: without atomics, so that it
// is the same every time. A sum is a pair of numbers: of float32, it is nearly as exact as a float64, for
// which most GPUs have little arithmetic.
#include "argument.h"
#include "check.h"
#include "fragment.h"
#include "sector_loop.h"

namespace sparseopt::cuda {
namespace {

// The sum high + low. The rounding errors of high are collected in low.
template <class T>
struct Sum {
  T high, low;

  __device__ __forceinline__ void add(T value, T error) {
    const T sum = high + value;
    const T added = sum - high;
    low += ((high - (sum - added)) + (value - added)) + error;
    high = sum;
  }

  __device__ __forceinline__ void add_square(T value) {
    const T square = value * value;
    add(square, multiply_add(value, value, -square));
  }
};

// The squares of the gradients of a sector, for for_each_sector().
template <class Stored, class T>
class SquaresOfSector {
 public:
  static constexpr int kWeights = kSectorWeights<Stored>;

  __device__ __forceinline__ explicit SquaresOfSector(const SectorArgument<T>& argument)
      : argument_(argument) {}

  __device__ __forceinline__ void read(const Sector& sector) {
    const Place at(argument_, sector);
    rows_ = SectorFactors<T>(at.tensor, at.e, sector.active, argument_.wide);
    g_.read(at.g, at.count, at.count == kWeights && is_aligned(at.g));
  }

  __device__ __forceinline__ void update(const Sector& sector) {
    const Place at(argument_, sector);
    rows_.for_each(at.tensor, sector.active, [&](unsigned active, T c) {
#pragma unroll
      for (int i = 0; i < kWeights; ++i) sum_.add_square(((active >> i) & 1u) != 0 ? c * g_.get(i) : T(0));
    });
  }

  __device__ __forceinline__ void write(const Sector&) const {}

  __device__ __forceinline__ Sum<T> sum() const { return sum_; }

 private:
  struct Place {
    const SectorRow& tensor;
    int64_t e;
    int count;
    const Stored* g;

    __device__ __forceinline__ Place(const SectorArgument<T>& argument, const Sector& sector)
        : tensor(argument.table[sector.tensor]) {
      e = int64_t(sector.number) * kWeights;
      const int64_t left = tensor.elements - e;
      count = left < kWeights ? static_cast<int>(left) : kWeights;
      g = reinterpret_cast<const Stored*>(argument.inputs.gradients[sector.tensor]) + e;
    }
  };

  const SectorArgument<T>& argument_;
  Fragment<Stored, kWeights> g_;
  SectorFactors<T> rows_;
  Sum<T> sum_{T(0), T(0)};
};

// Returns the sum over the block, in thread 0.
template <class T>
__device__ __forceinline__ Sum<T> sum_over_block(Sum<T> sum) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T high = __shfl_down_sync(~0u, sum.high, offset);
    const T low = __shfl_down_sync(~0u, sum.low, offset);
    sum.add(high, low);
  }
  __shared__ Sum<T> of_warp[kWarps];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kWarps; ++i) sum.add(of_warp[i].high, of_warp[i].low);
  return sum;
}

template <class Stored, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    sector_squares_kernel(const __grid_constant__ SectorArgument<T> argument) {
  SquaresOfSector<Stored, T> squares(argument);
  for_each_sector<kSectorWeights<Stored>>(argument, squares);
  const Sum<T> sum = sum_over_block(squares.sum());
  if (threadIdx.x == 0) {
    argument.sums[2 * int64_t(blockIdx.x)] = sum.high;
    // If the sum is infinite, `low` is NaN, which would hide that.
    argument.sums[2 * int64_t(blockIdx.x) + 1] = sum.high - sum.high == T(0) ? sum.low : T(0);
  }
}

}  // namespace

void sector_squares(const SectorLaunch& of, std::string_view gradients, uintptr_t sums, uintptr_t stream) {
  with_stored(of.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using T = typename ArithmeticOf<Stored>::type;
    launch("launching the gradient norm", sector_squares_kernel<Stored, T>,
           sector_blocks(of.dtype, of.most_chunks, of.multiprocessors), kThreads, stream,
           sector_argument<T>(of, Inputs{gradients, {}, 0, 0}, sums));
  });
}

}  // namespace sparseopt::cuda
