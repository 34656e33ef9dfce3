// How work is shared out among threads: what host and device must agree on.
#pragma once

#include <cstdint>

#include "../names.h"
#include "../update_rule.h"

namespace sparseopt::cuda {

constexpr int kLog2Threads = 8, kThreads = 1 << kLog2Threads;  // of a block
constexpr int kLog2Warp = 5, kWarp = 1 << kLog2Warp;
constexpr int kWarps = kThreads / kWarp;

// Neurons are updated in vectors, eight weights whose mask is one word of 64 bits: a thread has them all.
constexpr int kVectorSize = 8;
// Rows of more vectors have a block each. Not measured on a GPU yet.
constexpr int64_t kWarpRowVectors = 256;

SPARSEOPT_INLINE int64_t vectors_in(int64_t columns) { return (columns + kVectorSize - 1) / kVectorSize; }

// The threads of one row: as many as it has vectors, rounded up to a power of two, up to a warp; a block for
// a long row. Given as its logarithm.
SPARSEOPT_INLINE int log2_row_threads(int64_t vectors) {
  if (vectors > kWarpRowVectors) return kLog2Threads;
  int log2 = 0;
  while (log2 < kLog2Warp && (int64_t(1) << log2) < vectors) ++log2;
  return log2;
}

// The rows of a block.
inline int step_rows(int64_t columns) { return kThreads >> log2_row_threads(vectors_in(columns)); }

// A chunk of sectors is a warp's: no warp waits for another, as there is nothing to exchange, and a small
// tensor leaves at most 31 threads without work. By the model of an H100 (benchmarks/gpu_model.py), a step of
// ResNet-50 at 0.9 and 0.99 takes 1.02 and 1.03 times as long with 16, 1.00 and 1.04 times with 128.
constexpr int kChunk = kWarp;

// Half of what a multiprocessor can hold: at 64 registers a thread there are enough reads under way. By the
// model of an H100, a step of ResNet-50 at 0.9 and 0.99 takes 1.03 and 1.05 times as long with two blocks,
// 0.99 and 0.98 times with eight, for which there are no registers. In double precision, numbers take two
// each.
template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == sizeof(float) ? 4 : 2;

// Blocks that share out chunks: as many as run at the same time, unless there are fewer chunks.
inline int64_t sector_blocks(Dtype dtype, int64_t most_chunks, int multiprocessors) {
  const int fit =
      dtype == Dtype::kFloat64 ? kBlocksPerMultiprocessor<double> : kBlocksPerMultiprocessor<float>;
  const int64_t needed = (most_chunks + kWarps - 1) / kWarps, running = int64_t(fit) * multiprocessors;
  return needed < running ? needed : running;
}

}  // namespace sparseopt::cuda
