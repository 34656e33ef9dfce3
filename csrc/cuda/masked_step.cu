// A step with new masks, in one pass: it counts a neuron's fan-in in its boolean mask, then updates its
// weights in place. The threads of a row are as many as its vectors, but at most a warp, or a block for long
// rows.
#include "argument.h"
#include "check.h"
#include "fragment.h"
#include "mask_bits.h"
#include "tensor_rule.h"
#include "threads.h"

namespace sparseopt::cuda {
namespace {

// The mask of one neuron.
struct RowMask {
  const uint8_t* mask;
  int64_t columns;

  // Returns the number of weights in a vector: fewer at the end of the row.
  __device__ __forceinline__ int count(int64_t vector) const {
    const int64_t left = columns - vector * kVectorSize;
    return left < kVectorSize ? static_cast<int>(left) : kVectorSize;
  }

  // Returns the mask bits of a vector: 0 behind the end of the row.
  __device__ __forceinline__ unsigned bits(int64_t vector) const {
    if (vector * kVectorSize >= columns) return 0;
    return mask_bits<kVectorSize, uint64_t>(mask + vector * kVectorSize, count(vector));
  }
};

// Returns the sum over the threads of a row. All threads of the block must call it.
__device__ __forceinline__ int64_t sum_over_row(int64_t value, int row_threads) {
  const int lanes = row_threads < kWarp ? row_threads : kWarp;
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (row_threads <= kWarp) return value;
  __shared__ int64_t of_warp[kWarps];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < kWarps; ++i) value += of_warp[i];
  return value;
}

// Returns c_i of this thread's row. All threads of the block must call it.
template <class T>
__device__ __forceinline__ T factor_of(const StepRow& tensor, const RowMask& row, unsigned first_bits,
                                       int64_t vectors, int thread, int row_threads) {
  if (tensor.divisor == 0) return T(1);
  int64_t counted = __popc(first_bits);
#pragma unroll 1
  for (int64_t i = thread + row_threads; i < vectors; i += row_threads) counted += __popc(row.bits(i));
  const int64_t fan_in = sum_over_row(counted, row_threads);
  return correction_factor(fan_in, __ldg(reinterpret_cast<const T*>(tensor.divisor)));
}

// The update of a vector of weights. It is read as a whole before any of it is written, so that three loads
// are under way at once.
template <class Stored, class T>
class WeightVector {
 public:
  __device__ __forceinline__ WeightVector(const StepRow& tensor, int64_t gradient, int64_t e, int count)
      : p_(reinterpret_cast<Stored*>(tensor.parameter) + e),
        b_(tensor.momentum_buffer != 0 ? reinterpret_cast<Stored*>(tensor.momentum_buffer) + e : nullptr),
        g_(reinterpret_cast<const Stored*>(gradient) + e),
        count_(count),
        by_vectors_(count == kVectorSize && is_aligned(p_) && is_aligned(b_)) {}

  __device__ __forceinline__ void read() {
    own_p_.read(p_, count_, by_vectors_);
    if (b_ != nullptr) own_b_.read(b_, count_, by_vectors_);
    own_g_.read(g_, count_, count_ == kVectorSize && is_aligned(g_));
  }

  __device__ __forceinline__ void finish(const TensorRule<T>& update, unsigned active, T c) {
    own_p_.clear_inactive(active);
    own_b_.clear_inactive(active);
    update(own_p_, own_g_, own_b_, active, c);
    own_p_.write(p_, count_, by_vectors_);
    if (b_ != nullptr) own_b_.write(b_, count_, by_vectors_);
  }

 private:
  Stored *p_, *b_;
  const Stored* g_;
  int count_;
  bool by_vectors_;
  Fragment<Stored, kVectorSize> own_p_, own_g_, own_b_;
};

// Compiled for sm_90 by nvcc 13.0, double takes 138 registers; for two blocks, it would spill 112 bytes.
template <class T>
constexpr int kStepBlocks = sizeof(T) == sizeof(float) ? kBlocksPerMultiprocessor<T> : 1;

template <class Stored, class T>
__global__ void __launch_bounds__(kThreads, kStepBlocks<T>)
    masked_step_kernel(const __grid_constant__ StepArgument<T> argument) {
  const InputArgument<T>& inputs = argument.inputs;
  if (inputs.found_inf != nullptr && *inputs.found_inf != 0.0f) return;
  const int32_t index = argument.block_to_tensor[blockIdx.x];
  const StepRow tensor = argument.table[index];
  const RuleArgument<T>& rule = inputs.rules[tensor.rule];
  const int64_t columns = tensor.columns, vectors = vectors_in(columns);

  const int log2 = log2_row_threads(vectors), row_threads = 1 << log2;
  const int thread = static_cast<int>(threadIdx.x) & (row_threads - 1);
  const int64_t first_row = (int64_t(blockIdx.x) - tensor.first_program) << (kLog2Threads - log2);
  const int64_t row = first_row + (threadIdx.x >> log2), begin = row * columns;
  // Threads of rows behind the last have no weights, but must take part in the sums over rows.
  const bool inside = row < tensor.rows;
  const RowMask mask{reinterpret_cast<const uint8_t*>(tensor.mask) + begin, inside ? columns : 0};
  unsigned active = mask.bits(thread);
  const T c = factor_of<T>(tensor, mask, active, inside ? vectors : 0, thread, row_threads);
  if (!inside) return;

  const TensorRule<T> update(inputs, rule, tensor.momentum_buffer != 0, tensor.ham != 0);
#pragma unroll 1
  for (int64_t i = thread; i < vectors; i += row_threads) {
    WeightVector<Stored, T> vector(tensor, inputs.gradients[index], begin + i * kVectorSize, mask.count(i));
    if (active != 0) vector.read();
    // The next mask is read while these weights are loaded.
    const unsigned next = mask.bits(i + row_threads);
    if (active != 0) vector.finish(update, active, c);
    active = next;
  }
}

}  // namespace

void masked_step(const StepLaunch& of, const Inputs& inputs, uintptr_t stream) {
  with_stored(of.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using T = typename ArithmeticOf<Stored>::type;
    const StepArgument<T> argument{reinterpret_cast<const StepRow*>(of.table),
                                   reinterpret_cast<const int32_t*>(of.block_to_tensor),
                                   input_argument<T>(inputs)};
    launch("launching the step with new masks", masked_step_kernel<Stored, T>, of.blocks, kThreads, stream,
           argument);
  });
}

}  // namespace sparseopt::cuda
