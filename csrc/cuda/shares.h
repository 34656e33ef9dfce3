// How the work on a tensor is shared out among the threads of a launch: what host and device must agree on.
#pragma once

#include <cstdint>

#include "../update_rule.h"

namespace sparseopt::cuda {

constexpr int kLog2Threads = 8, kThreads = 1 << kLog2Threads;  // of a block
constexpr int kLog2Warp = 5, kWarp = 1 << kLog2Warp;
constexpr int kLanes = 8;  // weights of one mask byte: a thread has them all
constexpr int kDenseBytesPerThread = 2;
constexpr int64_t kWarpRowBytes = 256;   // rows of more bytes have a block each
constexpr int64_t kMaxBlocks = 1 << 16;  // of one tensor; each then takes several shares

SPARSEOPT_INLINE int64_t bytes_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// The threads of one row: as many as it has bytes, rounded up to a power of two, up to a warp; a block for
// a long row. Given as its logarithm.
SPARSEOPT_INLINE int log2_row_threads(int64_t row_bytes) {
  if (row_bytes > kWarpRowBytes) return kLog2Threads;
  int log2 = 0;
  while (log2 < kLog2Warp && (int64_t(1) << log2) < row_bytes) ++log2;
  return log2;
}

// How many blocks a tensor gets: no more than can be counted for a whole launch.
inline int64_t blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

inline int64_t blocks_of(int64_t rows, int64_t columns, bool masked) {
  const int64_t bytes = bytes_of(columns);
  return blocks_for(masked ? rows << log2_row_threads(bytes)
                           : (bytes + kDenseBytesPerThread - 1) / kDenseBytesPerThread);
}

}  // namespace sparseopt::cuda
