// The sum of (c_i * g)^2 over the active weights, as one partial sum per block: no atomics, so that it is
// the same every time. Sums are pairs of numbers: float32 pairs are nearly as exact as float64, and a GPU
// has little arithmetic for that.
#include "../dtypes.h"
#include "../update_rule.h"
#include "argument.h"
#include "check.h"
#include "octet.h"
#include "rows.h"

namespace sparseopt::cuda {
namespace {

// high + low, where low holds what rounding took from high.
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

// The squares of the gradients of one mask byte.
template <class Stored>
struct Squares {
  using T = typename ArithmeticOf<Stored>::type;

  const Stored* g;
  Sum<T> sum;

  __device__ __forceinline__ void operator()(int64_t offset, int count, unsigned active, T c) {
    Stored stored[kLanes] = {};
    read(stored, g + offset, count, count == kLanes && is_aligned(g + offset));
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum.add_square(((active >> i) & 1u) != 0 ? c * load(stored[i]) : T(0));
  }
};

// The sum over the block, in thread 0.
template <class T>
__device__ __forceinline__ Sum<T> sum_over_block(Sum<T> sum) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T high = __shfl_down_sync(~0u, sum.high, offset);
    const T low = __shfl_down_sync(~0u, sum.low, offset);
    sum.add(high, low);
  }
  __shared__ Sum<T> of_warp[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kThreads / kWarp; ++i) sum.add(of_warp[i].high, of_warp[i].low);
  return sum;
}

template <class Stored, class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Argument<T> argument) {
  const Share share = share_of(argument, blockIdx.x);
  const TensorArgument& tensor = argument.tensors[share.tensor];
  Squares<Stored> squares{static_cast<const Stored*>(tensor.grad), {T(0), T(0)}};
  for_each_byte<T>(tensor, argument.rules[tensor.rule].correction, share, squares);
  const Sum<T> sum = sum_over_block(squares.sum);
  if (threadIdx.x == 0) {
    argument.partial_sums[2 * int64_t(blockIdx.x)] = sum.high;
    // Beside an infinite sum there is a NaN, which would hide it.
    argument.partial_sums[2 * int64_t(blockIdx.x) + 1] = sum.high - sum.high == T(0) ? sum.low : T(0);
  }
}

template <class Stored>
void norm_stored(const Table& table, const Step& step, uintptr_t partial_sums, uintptr_t stream) {
  using T = typename ArithmeticOf<Stored>::type;
  T* to = reinterpret_cast<T*>(partial_sums);
  for (const Launch& of : table.launches()) {
    Argument<T> argument = argument_of<T>(table, of, step);
    argument.partial_sums = to;
    launch("launching the gradient norm", norm_kernel<Stored, T>, of.blocks, kThreads, stream, argument);
    to += 2 * int64_t(of.blocks);
  }
}

}  // namespace

void squared_norm(const Table& table, const Step& step, uintptr_t partial_sums, uintptr_t stream) {
  switch (table.dtype()) {
    case Dtype::kFloat32:
      return norm_stored<float>(table, step, partial_sums, stream);
    case Dtype::kFloat64:
      return norm_stored<double>(table, step, partial_sums, stream);
    case Dtype::kBFloat16:
      return norm_stored<BFloat16>(table, step, partial_sums, stream);
    case Dtype::kFloat16:
      return norm_stored<Half>(table, step, partial_sums, stream);
  }
}

}  // namespace sparseopt::cuda
