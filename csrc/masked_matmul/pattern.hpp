// The sparsity pattern of a weight, compiled once from its mask into one block of memory: the
// kept entries row by row, and twice more in the orders in which the kernels walk them.
//
// One block, because it travels as one tensor: through PyTorch's operators, `torch.compile`,
// devices and processes. Its first words are a header that says where the sections lie.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "common/view.hpp"

namespace jacpot::masked_matmul {

// One direction of the pattern. Row-wise, line r is row r of the weight and its indices are
// columns; column-wise the other way round.
//
// The length is cut into tiles of `span` indices, so that the part of a panel that a tile refers to
// stays in a cache, and the entries lie tile by tile, in a tile line by line: a run for each, where
// indices rise and count from the tile's first. A kernel reads them from end to end.
struct Lines {
  std::int64_t lines = 0;   // how many
  std::int64_t length = 0;  // of each, kept or not
  std::int64_t nnz = 0;
  std::int64_t span = 1, tiles = 1;
  int index_bytes = 2;                    // 2 where `span` fits 16 bits, else 4
  const std::int32_t* offsets = nullptr;  // (lines + 1,): entries of the lines before
  const std::int32_t* starts = nullptr;   // (tiles · lines + 1,): where each run begins
  const void* indices = nullptr;          // (nnz,) uint16 or int32
};

struct Pattern {
  Lines rows;  // in one tile: the order of the values
  Lines row_tiles;
  const std::int32_t* run_places = nullptr;  // (tiles · lines,): each run's first in row order
  Lines column_tiles;
  const std::int32_t* places = nullptr;  // (nnz,): each entry of column_tiles in row order
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
