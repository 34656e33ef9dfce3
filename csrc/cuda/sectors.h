// A sector is 32 bytes of a parameter, as memory is read: what kernels over sectors have in common.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sparseopt::cuda {

constexpr int kSectorBytes = 32;

template <class Stored>
constexpr int kSectorWeights = kSectorBytes / int(sizeof(Stored));

// The mask bits of a sector.
template <int kWeights>
using SectorBits = std::conditional_t<(kWeights > 8), uint16_t, uint8_t>;

}  // namespace sparseopt::cuda
