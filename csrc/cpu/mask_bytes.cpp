#include "mask_bytes.h"

#include <algorithm>
#include <stdexcept>

#include "bit_words.h"
#include "step.h"

namespace sparseopt::cpu {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements that one thread works on at a time

int64_t count(const uint8_t* mask, int64_t bytes) {
  int64_t found = 0;
  for (int64_t i = 0; i < bytes; i += kWord) found += count_bits(pack_bytes(mask + i, bytes - i));
  return found;
}

}  // namespace

void zero_outside(const uint8_t* mask, void* data, int64_t numel, int element_bytes, int threads) {
  if (element_bytes != 2 && element_bytes != 4 && element_bytes != 8)
    throw std::invalid_argument("element_bytes must be 2, 4 or 8");
  const Loops& loops = chosen_loops();
  threads = static_cast<int>(std::clamp<int64_t>(numel / kPiece, 1, std::max(threads, 1)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < numel; begin += kPiece)
    loops.zero_outside(mask + begin, static_cast<char*>(data) + begin * element_bytes,
                       std::min(kPiece, numel - begin), element_bytes);
}

int64_t largest_row_count(const uint8_t* mask, int64_t rows, int64_t columns, int threads) {
  threads = static_cast<int>(std::clamp<int64_t>(rows * columns / kPiece, 1, std::max(threads, 1)));
  int64_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(max : largest)
  for (int64_t row = 0; row < rows; ++row) largest = std::max(largest, count(mask + row * columns, columns));
  return largest;
}

}  // namespace sparseopt::cpu
