// A step over the live sectors of all tensors, in place.
#include "argument.h"
#include "check.h"
#include "fragment.h"
#include "sector_loop.h"
#include "tensor_rule.h"

namespace sparseopt::cuda {
namespace {

// The update of a sector, for for_each_sector(). All of it is read before any is written.
template <class Stored, class T>
class StepOfSector {
 public:
  static constexpr int kWeights = kSectorWeights<Stored>;

  __device__ __forceinline__ explicit StepOfSector(const SectorArgument<T>& argument) : argument_(argument) {}

  __device__ __forceinline__ void read(const Sector& sector) {
    const Place at(argument_, sector);
    rows_ = SectorFactors<T>(at.tensor, at.e, sector.active, argument_.wide);
    const auto* from_g = reinterpret_cast<const Stored*>(argument_.inputs.gradients[sector.tensor]) + at.e;
    p_.read(at.p, at.count, at.vectors);
    if (at.b != nullptr) b_.read(at.b, at.count, at.vectors);
    // Gradients may not be aligned: DistributedDataParallel makes them views of buckets.
    g_.read(from_g, at.count, at.count == kWeights && is_aligned(from_g));
  }

  __device__ __forceinline__ void update(const Sector& sector) {
    const Place at(argument_, sector);
    const TensorRule<T> rule(argument_.inputs, at.rule, at.b != nullptr, at.tensor.ham != 0);
    p_.clear_inactive(sector.active);
    b_.clear_inactive(sector.active);
    rows_.for_each(at.tensor, sector.active, [&](unsigned active, T c) { rule(p_, g_, b_, active, c); });
  }

  __device__ __forceinline__ void write(const Sector& sector) {
    const Place at(argument_, sector);
    p_.write(at.p, at.count, at.vectors);
    if (at.b != nullptr) b_.write(at.b, at.count, at.vectors);
  }

 private:
  // The addresses of a sector. Found anew in each call, which for_each_sector() explains.
  struct Place {
    const SectorRow& tensor;
    const RuleArgument<T>& rule;
    int64_t e;
    int count;
    Stored *p, *b;
    bool vectors;

    __device__ __forceinline__ Place(const SectorArgument<T>& argument, const Sector& sector)
        : tensor(argument.table[sector.tensor]), rule(argument.inputs.rules[tensor.rule]) {
      e = int64_t(sector.number) * kWeights;
      const int64_t left = tensor.elements - e;
      count = left < kWeights ? static_cast<int>(left) : kWeights;
      p = reinterpret_cast<Stored*>(tensor.parameter) + e;
      b = tensor.momentum_buffer != 0 ? reinterpret_cast<Stored*>(tensor.momentum_buffer) + e : nullptr;
      vectors = count == kWeights && is_aligned(p) && is_aligned(b);
    }
  };

  const SectorArgument<T>& argument_;
  Fragment<Stored, kWeights> p_, g_, b_;
  SectorFactors<T> rows_;
};

template <class Stored, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    sector_step_kernel(const __grid_constant__ SectorArgument<T> argument) {
  const float* found_inf = argument.inputs.found_inf;
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  StepOfSector<Stored, T> step(argument);
  for_each_sector<kSectorWeights<Stored>>(argument, step);
}

}  // namespace

void sector_step(const SectorLaunch& of, const Inputs& inputs, uintptr_t stream) {
  with_stored(of.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using T = typename ArithmeticOf<Stored>::type;
    launch("launching the step", sector_step_kernel<Stored, T>,
           sector_blocks(of.dtype, of.most_chunks, of.multiprocessors), kThreads, stream,
           sector_argument<T>(of, inputs, 0));
  });
}

}  // namespace sparseopt::cuda
