#include "step.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../dtypes.h"

namespace sparseopt::cpu {

#ifdef SPARSEOPT_X86
extern const Loops kAvx512Loops, kAvx2Loops;
#endif
extern const Loops kPlainLoops;

namespace {

// Blocks in a chunk: many let processors prefetch, few let threads share little work. Figures are parts of
// the time with these constants, by make tuning on a Zen 3, two threads. At 0.5 and 0.97, chunks of at most
// 1 << 12 take 1.01 and 1.02, 1 << 16 1.00 and 1.03 (noise 3%). ResNet-20 at 0.9: chunks of at least 1 << 6
// take 0.99, 1 << 10 1.03 (noise 0%).
constexpr int64_t kLongestChunk = 1 << 14, kShortestChunk = 1 << 8;
// The fewest, unless chunks would be shorter than the shortest. ResNet-20 at 0.9: 4 and 64 take 0.95 (noise
// 15%).
constexpr int64_t kChunksOfAStep = 1 << 4;
// Blocks of a thread: to wake one for fewer takes longer than their update. ResNet-20 at 0.9: 1 << 9 takes
// 1.02, 1 << 13 1.19 (noise 1%); 64 layers of 32x32: 0.93 and 1.00 (noise 1%).
constexpr int64_t kWorthAThread = 1 << 11;
// Blocks of a chunk: fewer are updated too fast to be timed. ResNet-20 at 0.9: 1 takes 1.08, 1 << 10 0.92
// (noise 15%).
constexpr int64_t kWorthTiming = 1 << 7;

std::vector<const Loops*> supported_loops() {
  std::vector<const Loops*> loops;
#ifdef SPARSEOPT_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    loops.push_back(&kAvx512Loops);
  if (avx2) loops.push_back(&kAvx2Loops);
#endif
  loops.push_back(&kPlainLoops);
  return loops;
}

int element_bytes(Dtype dtype) {
  return with_stored(dtype, [](auto stored) { return int(sizeof stored); });
}

int64_t step_bytes(const std::vector<TensorStep>& updates) {
  int64_t bytes = 0;
  for (const TensorStep& update : updates) {
    const Tensor& tensor = *update.tensor;
    bytes += tensor.numel * element_bytes(tensor.dtype) * (tensor.momentum_buffer ? 3 : 2);
  }
  return bytes;
}

bool has_choice(const TensorStep& update) { return update.tensor->mask && update.tensor->mask->has_list(); }

Kind kind_of(const TensorStep& update, int64_t step_bytes) {
  const Tensor& tensor = *update.tensor;
  return {step_bytes, tensor.mask->live_share(), element_bytes(tensor.dtype),
          tensor.momentum_buffer != nullptr, update.ham()};
}

int64_t total_blocks(const std::vector<TensorStep>& updates) {
  int64_t blocks = 0;
  for (const TensorStep& update : updates) blocks += blocks_of(update.tensor->numel);
  return blocks;
}

// Cuts the updates of a step, or of a norm, whose chunks are not timed.
std::vector<Chunk> cut(const std::vector<TensorStep>& updates, int64_t step_bytes, bool is_step) {
  std::vector<Kind> kinds;
  for (const TensorStep& update : updates)
    if (has_choice(update)) kinds.push_back(kind_of(update, step_bytes));
  const std::vector<Choice> choices = strategies().choices(kinds, is_step);
  const int64_t size = std::clamp(total_blocks(updates) / kChunksOfAStep, kShortestChunk, kLongestChunk);
  auto next = choices.begin();
  std::vector<Chunk> chunks;
  for (const TensorStep& update : updates) {
    Choice choice{Strategy::kStream, false};
    if (has_choice(update)) choice = *next++;
    const int64_t blocks = blocks_of(update.tensor->numel);
    for (int64_t begin = 0; begin < blocks; begin += size) {
      const int64_t end = std::min(begin + size, blocks);
      chunks.push_back({&update, begin, end, choice.strategy, choice.timed && end - begin >= kWorthTiming});
    }
  }
  return chunks;
}

int useful_threads(const std::vector<TensorStep>& updates, int threads) {
  return static_cast<int>(
      std::clamp<int64_t>(total_blocks(updates) / kWorthAThread, 1, std::max(threads, 1)));
}

// Calls work(i) for all i below `count`. A thread begins with the same part in every step, of which its
// core's cache may hold something. Then it takes over what other threads have not begun.
template <class Work>
void share_out(int64_t count, int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
    struct alignas(64) Part {  // a cache line each
      std::atomic<int64_t> next;
      int64_t end;
    };
    std::vector<Part> parts(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) {
      parts[i].next = count * i / threads;
      parts[i].end = count * (i + 1) / threads;
    }
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < threads; ++i) {
      Part& part = parts[(omp_get_thread_num() + i) % threads];
      for (int64_t next; (next = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) work(next);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) work(i);
}

// Reports the time of timed chunks to strategy.h: a mean over the blocks of each kind.
void tell(const std::vector<Chunk>& chunks, const std::vector<double>& ns, int64_t step_bytes) {
  struct Sum {
    Kind kind;
    Strategy strategy;
    double ns, blocks;
  };
  std::map<int64_t, Sum> sums;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const Chunk& chunk = chunks[i];
    if (!chunk.timed) continue;
    const Kind kind = kind_of(*chunk.update, step_bytes);
    Sum& sum = sums.try_emplace(kind.key(), Sum{kind, chunk.strategy, 0, 0}).first->second;
    sum.ns += ns[i];
    sum.blocks += double(chunk.end - chunk.begin);
  }
  for (const auto& [key, sum] : sums) strategies().measured(sum.kind, sum.strategy, sum.ns / sum.blocks);
}

double nanoseconds() {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

const Loops& chosen_loops() {
  static const std::vector<const Loops*> supported = supported_loops();
  const char* name = std::getenv("SPARSEOPT_CPU_ISA");
  if (name == nullptr || *name == '\0') return *supported.front();
  std::string known;
  for (const Loops* loops : supported) {
    if (std::string(name) == loops->isa) return *loops;
    known += std::string(known.empty() ? "" : ", ") + loops->isa;
  }
  throw std::runtime_error("SPARSEOPT_CPU_ISA is '" + std::string(name) + "', this processor can run " +
                           known);
}

void step(const std::vector<TensorStep>& updates, int threads) {
  const Loops& loops = chosen_loops();
  const int64_t bytes = step_bytes(updates);
  const std::vector<Chunk> chunks = cut(updates, bytes, true);
  threads = useful_threads(updates, threads);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> ns(chunks.size());
  share_out(count, threads, [&](int64_t i) {
    const double start = chunks[i].timed ? nanoseconds() : 0;
    loops.update(chunks[i]);
    if (chunks[i].timed) ns[i] = nanoseconds() - start;
  });
  tell(chunks, ns, bytes);
}

double squared_norm(const std::vector<TensorStep>& updates, int threads, bool dense) {
  const Loops& loops = chosen_loops();
  const std::vector<Chunk> chunks = cut(updates, step_bytes(updates), false);
  threads = useful_threads(updates, threads);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> sums(chunks.size());
  share_out(count, threads, [&](int64_t i) { sums[i] = loops.squared_norm(chunks[i], dense); });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Loops* loops : supported_loops()) names.emplace_back(loops->isa);
  return names;
}

}  // namespace sparseopt::cpu
