// Sectors: 32 bytes of a parameter, the unit in which memory is read.
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
