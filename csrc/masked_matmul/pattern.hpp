// The sparsity pattern of a weight, compiled once from its mask into one block of memory: the
// kept entries row by row and column by column, and the permutation between the two orders.
//
// One block, because it travels as one tensor: through PyTorch's operators, `torch.compile`,
// devices and processes. Its first words are a header that says where the sections lie.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "common/view.hpp"

namespace jacpot::masked_matmul {

inline constexpr std::int64_t entries_per_step = 8;

// One direction of the pattern. Row-wise, line r is row r of the weight and its indices are
// columns; column-wise the other way round. Indices rise within a line.
struct Lines {
  std::int64_t lines = 0;   // how many
  std::int64_t length = 0;  // of each, kept or not: indices are below it
  std::int64_t nnz = 0;
  int index_bytes = 2;                        // 2 where `length` fits 16 bits, else 4
  const std::int32_t* offsets = nullptr;      // (lines + 1,)
  const void* indices = nullptr;              // (nnz,) uint16 or int32
  const std::int32_t* permutation = nullptr;  // entry -> its place in row order; null row-wise
  // The grid cuts the length into steps of about `entries_per_step` entries each, from which the
  // kernels put together tiles of the size of a cache: (steps + 1, lines), where row s holds each
  // line's first entry with an index of at least s · step.
  std::int64_t step = 1, steps = 0;
  const std::int32_t* grid = nullptr;
};

struct Pattern {
  Lines rows, columns;
};

// Kept entries of every row and the bytes that the compiled pattern will need.
// `offsets` (rows + 1,) is written. More than 2^31 - 1 kept entries or lines are refused.
Status measure(const View<const bool, 2>& mask, std::int32_t* offsets, std::int64_t* bytes,
               int threads);

// Writes the pattern into `block`, which has the measured bytes.
Status compile(const View<const bool, 2>& mask, const std::int32_t* offsets, void* block,
               std::int64_t bytes, int threads);

// Reads the header of a compiled pattern; refuses what is not one.
Status open(const void* block, std::int64_t bytes, Pattern* pattern);

// values (nnz,) in row order <-> weight (rows, columns) of elements of `element_bytes` (2, 4 or 8).
// Strides count elements. `expand` writes zeros where nothing is kept.
Status compress(const Pattern& pattern, int element_bytes, const void* weight,
                std::int64_t row_stride, std::int64_t column_stride, void* values, int threads);
Status expand(const Pattern& pattern, int element_bytes, const void* values, void* weight,
              int threads);

}  // namespace jacpot::masked_matmul
