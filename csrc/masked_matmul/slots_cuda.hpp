// The product with a very sparse weight in 16 bits, on tensor cores.
//
//   product[r, n] = Σ_c S[r, c] · gathered[c, n]  (+ bias[r], then max(·, 0) with relu)
//
// Eight rows of S are a window. Sixteen of its entries, each of any row and column, are a block:
// one product of tensor cores, of the 16 rows of activations that their columns name, with a matrix
// (16, 8) that holds each entry's value in the column of its row. That matrix is put together in
// registers; what is stored of an entry are four bytes. In contrast to the walk of
// masked_matmul_cuda.hpp, an activation meets zeros at the other rows of the window: infinity gives
// NaN there.
//
// The columns of S pass by in tiles, and the last three of them are in shared memory. An entry may
// be taken with any of the tiles that are there when its own is. With this freedom, and that of the
// order inside a window, entries are put into slots (jacpot.ops.masked_matmul_slots): the eight
// that are read at a time lie in different banks, and warps reach the end of a tile together.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"
#include "common/view.hpp"

namespace jacpot::masked_matmul {

inline constexpr std::int64_t window_rows = 8, block_slots = 16;
inline constexpr std::int64_t windows_of_warp = 4;
inline constexpr std::int64_t tiles_there = 4;  // in shared memory: three, and one that arrives
inline constexpr std::int64_t spare_words = 2 * block_slots;  // read ahead
inline constexpr std::int64_t slot_banks = 8;                 // of 16 bytes

struct CudaSlots {
  DType dtype = DType::bfloat16;  // of values, gathered, bias and product: bfloat16 or float16
  std::int64_t rows = 0, columns = 0, batch = 0;
  std::int64_t tile = 0;  // columns of one: a multiple of eight
  // (columns / 8,): column c lies at (c + rotations[c / 8]) % 8 of its eight.
  const std::uint8_t* rotations = nullptr;
  std::int64_t warps = 0;                 // that take four windows each
  const std::int32_t* windows = nullptr;  // (warps, 4); behind the last one where there is none
  const std::int32_t* begins = nullptr;   // (warps · tiles · 4 + 1,): blocks of each window
  std::int64_t slots = 0;                 // of all blocks
  // (slots,): eight times the place of the entry's column in shared memory, plus its row in its
  // window. The i-th of a block has the k-th place of the sum, k = 2 (i / 4) + i % 2 + 8 (i / 2 %
  // 2), and lies in bank k % 8.
  const std::int16_t* places = nullptr;
  const std::int32_t* sources = nullptr;  // (slots,): which of the values it is, or -1
  const void* values = nullptr;           // (kept,)
  std::uint32_t* words = nullptr;         // (slots + spare_words,): room for places beside values
  // (columns, batch) by these strides, of which one is 1 and the other a multiple of 8. 16-byte
  // aligned; readable up to a multiple of eight in the direction of the stride 1.
  const void* gathered = nullptr;
  std::int64_t column_stride = 0, gathered_batch_stride = 0;
  const void* bias = nullptr;  // (rows,) or null
  bool relu = false;
  void* product = nullptr;  // (rows, batch) by these strides
  std::int64_t row_stride = 0, batch_stride = 0;
};

// How many columns of a weight are best staged at a time.
Status cuda_slot_tile(std::int64_t columns, cuda::Queue queue, std::int64_t* tile);

Status cuda_multiply_slots(const CudaSlots& slots, cuda::Queue queue);

}  // namespace jacpot::masked_matmul
