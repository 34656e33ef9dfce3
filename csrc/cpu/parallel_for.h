// A loop over the weights or neurons of a layer, shared out to threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparseopt::cpu {

// Weights that a thread takes at a time, whole words. RigL updates of 16.8 million weights: 1 << 13 and
// 1 << 19 take 0.95 of its time (make tuning, Zen 3; noise 5%).
constexpr int64_t kGrain = 1 << 16;

// Cuts [0, total) into ranges of `size`, and calls body(range, begin, end) with the number of each. There are
// no more threads than ranges, because to wake one costs more than a small layer.
template <class Body>
void parallel_for(int64_t total, int64_t size, int threads, Body body) {
  const int64_t count = (total + size - 1) / size;
  threads = static_cast<int>(std::clamp<int64_t>(count, 1, std::max(threads, 1)));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) body(i, i * size, std::min((i + 1) * size, total));
}

}  // namespace sparseopt::cpu
