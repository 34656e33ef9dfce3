// The sharing of work among threads: constants and functions for host and device.
#pragma once

#include <cstdint>

#include "../names.h"
#include "../update_rule.h"

namespace sparseopt::cuda {

constexpr int kLog2Threads = 8, kThreads = 1 << kLog2Threads;  // of a block
constexpr int kLog2Warp = 5, kWarp = 1 << kLog2Warp;
constexpr int kWarps = kThreads / kWarp;

// Weights of a neuron that a thread updates at a time: their mask is one load of 8 bytes. Compiled for sm_90
// by nvcc 13.0, float32 takes 64 registers, the most that four blocks leave; with 16, it would spill 122
// bytes.
constexpr int kVectorSize = 8;
// Rows of more vectors have a block each. Computed, not measured: a step of ResNet-50 with new masks has 5903
// blocks, of which an H100 runs 528 at a time, a thread has at most 8 vectors in turn, and in 17% of the
// turns it has none. With 64 it is 11650 blocks, 3 and 28%; with 1024, 3215 blocks, 18 and 0.4%.
constexpr int64_t kWarpRowVectors = 256;

SPARSEOPT_INLINE int64_t vectors_in(int64_t columns) { return (columns + kVectorSize - 1) / kVectorSize; }

// Returns log2 of the threads of a row: as many as its vectors, rounded up to a power of two, but at most a
// warp. A long row has a block.
SPARSEOPT_INLINE int log2_row_threads(int64_t vectors) {
  if (vectors > kWarpRowVectors) return kLog2Threads;
  int log2 = 0;
  while (log2 < kLog2Warp && (int64_t(1) << log2) < vectors) ++log2;
  return log2;
}

// Returns the rows of a block.
inline int step_rows(int64_t columns) { return kThreads >> log2_row_threads(vectors_in(columns)); }

// Sectors of a chunk, which a warp takes at a time. Warps exchange nothing, and so need not wait for each
// other; a small tensor leaves at most 31 threads without work. By the model of an H100
// (benchmarks/gpu_model.py, under its two assumptions on memory), a step of ResNet-50 at 0.9 and 0.99 takes
// 1.00-1.02 and 1.00-1.02 times as long with 16, 1.00 and 1.04-1.06 times with 128.
constexpr int kChunk = kWarp;

// Half of what a multiprocessor can hold: with 64 registers a thread, enough loads are under way. By the
// model of an H100, a step of ResNet-50 at 0.9 and 0.99 takes 1.00-1.03 and 1.01-1.04 times as long with two
// blocks, 0.99-1.00 and 0.98-0.99 times with eight, for which there are not enough registers. A double takes
// two registers.
template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == sizeof(float) ? 4 : 2;

// Returns the number of blocks that share out chunks: as many as run at a time, or as there is work for.
inline int64_t sector_blocks(Dtype dtype, int64_t most_chunks, int multiprocessors) {
  const int fit =
      dtype == Dtype::kFloat64 ? kBlocksPerMultiprocessor<double> : kBlocksPerMultiprocessor<float>;
  const int64_t needed = (most_chunks + kWarps - 1) / kWarps, running = int64_t(fit) * multiprocessors;
  return needed < running ? needed : running;
}

}  // namespace sparseopt::cuda
