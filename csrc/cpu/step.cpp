#include "step.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace sparseopt::cpu {

#ifdef SPARSEOPT_X86
extern const Loops kAvx512Loops, kAvx2Loops;
#endif
extern const Loops kPlainLoops;

namespace {

constexpr int64_t kChunkElements = 1 << 15;

std::vector<const Loops*> supported_loops() {
  std::vector<const Loops*> loops;
#ifdef SPARSEOPT_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    loops.push_back(&kAvx512Loops);
  if (avx2) loops.push_back(&kAvx2Loops);
#endif
  loops.push_back(&kPlainLoops);
  return loops;
}

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

std::vector<Chunk> cut(const std::vector<Update>& updates) {
  std::vector<Chunk> chunks;
  for (const Update& update : updates) {
    const PackedMask* mask = update.tensor->mask;
    const int64_t end = mask ? mask->rows() : update.tensor->numel;
    const int64_t size =
        mask ? std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, mask->columns())) : kChunkElements;
    for (int64_t begin = 0; begin < end; begin += size)
      chunks.push_back({&update, begin, std::min(begin + size, end)});
  }
  return chunks;
}

// Waking other threads costs more than a small step.
int useful_threads(const std::vector<Update>& updates, int threads) {
  int64_t elements = 0;
  for (const Update& update : updates) elements += update.tensor->numel;
  return static_cast<int>(std::clamp<int64_t>(elements / kChunkElements, 1, std::max(threads, 1)));
}

}  // namespace

void step(const std::vector<Update>& updates, int threads) {
  const Loops& loops = chosen_loops();
  const std::vector<Chunk> chunks = cut(updates);
  threads = useful_threads(updates, threads);
  const int64_t count = static_cast<int64_t>(chunks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) loops.update(chunks[i]);
}

double squared_norm(const std::vector<Update>& updates, int threads) {
  const Loops& loops = chosen_loops();
  const std::vector<Chunk> chunks = cut(updates);
  threads = useful_threads(updates, threads);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> sums(chunks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) sums[i] = loops.squared_norm(chunks[i]);
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
