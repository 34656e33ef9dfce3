// The rows of the tables in device memory that kernels read, one for each tensor. Python makes them: fields
// are those of StepRow and SectorRow in gpu/tables.py and of ListRow in gpu/lists.py, and a test compares
// their names.
#pragma once

#include <cstdint>

namespace sparseopt::cuda {

#define SPARSEOPT_STEP_ROW(FIELD) \
  FIELD(parameter)                \
  FIELD(momentum_buffer)          \
  FIELD(mask)                     \
  FIELD(divisor)                  \
  FIELD(rows)                     \
  FIELD(columns)                  \
  FIELD(first_program)            \
  FIELD(rule)                     \
  FIELD(ham)

#define SPARSEOPT_SECTOR_ROW(FIELD) \
  FIELD(parameter)                  \
  FIELD(momentum_buffer)            \
  FIELD(mask_bits)                  \
  FIELD(listed)                     \
  FIELD(visited_bits)               \
  FIELD(factors)                    \
  FIELD(columns)                    \
  FIELD(elements)                   \
  FIELD(rule)                       \
  FIELD(ham)                        \
  FIELD(first_chunk)                \
  FIELD(length)

#define SPARSEOPT_LIST_ROW(FIELD) \
  FIELD(mask)                     \
  FIELD(rows)                     \
  FIELD(columns)                  \
  FIELD(elements)                 \
  FIELD(first_row)                \
  FIELD(first_program)            \
  FIELD(capacity)                 \
  FIELD(mask_bits)                \
  FIELD(listed)                   \
  FIELD(listed_bits)

#define SPARSEOPT_MEMBER(name) int64_t name;
#define SPARSEOPT_NAME(name) #name,

struct StepRow {
  SPARSEOPT_STEP_ROW(SPARSEOPT_MEMBER)
};
struct SectorRow {
  SPARSEOPT_SECTOR_ROW(SPARSEOPT_MEMBER)
};
struct ListRow {
  SPARSEOPT_LIST_ROW(SPARSEOPT_MEMBER)
};

constexpr const char* kStepRowFields[] = {SPARSEOPT_STEP_ROW(SPARSEOPT_NAME)};
constexpr const char* kSectorRowFields[] = {SPARSEOPT_SECTOR_ROW(SPARSEOPT_NAME)};
constexpr const char* kListRowFields[] = {SPARSEOPT_LIST_ROW(SPARSEOPT_NAME)};

#undef SPARSEOPT_MEMBER
#undef SPARSEOPT_NAME

// Without gaps: a table is an array of int64.
static_assert(sizeof(StepRow) == sizeof(int64_t) * 9);
static_assert(sizeof(SectorRow) == sizeof(int64_t) * 12);
static_assert(sizeof(ListRow) == sizeof(int64_t) * 10);

}  // namespace sparseopt::cuda
