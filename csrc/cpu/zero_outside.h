// Applies a boolean mask that is not packed.
#pragma once

#include <cstdint>

namespace sparseopt::cpu {

// Zeroes the elements of `data` whose byte of `mask` is 0. Blocks that are right already are not written.
// `element_bytes` is 2, 4 or 8.
void zero_outside(const uint8_t* mask, void* data, int64_t numel, int element_bytes, int threads);

}  // namespace sparseopt::cpu
