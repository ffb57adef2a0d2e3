// Products with the kept entries of a weight, on a GPU.
//
// One kernel serves the forward pass, both gradients, and all of them at once. It walks the rows
// of a compressed matrix S (rows, columns): the weight itself forward, its transpose backward.
//
//   product[r, n] = Σ_c S[r, c] · gathered[c, n]  (+ bias[r], then max(·, 0) with relu)
//   sampled[r, c] = Σ_n held[r, n] · gathered[c, n]   at the kept (r, c) only
//
// With S = Wᵀ, gathered = dy and held = x these are dx and dW of y = x Wᵀ: both use each gathered
// value once it is in a register.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"
#include "common/view.hpp"

namespace jacpot::masked_matmul {

inline constexpr int run_rows = 8;  // neighbouring rows that stay in one block
inline constexpr std::int64_t walk_column_bytes =
    256;  // of the batch, staged of a column at a time
inline constexpr std::int64_t most_tile_columns =
    INT16_MAX / (walk_column_bytes / 16);  // of a tile

struct CudaWalk {
  DType dtype = DType::float32;  // of values, gathered, held, bias and product: any float
  std::int64_t rows = 0, columns = 0, kept = 0, batch = 0;
  std::int64_t tile = 0;  // columns that are staged at a time
  // (kept,): 16 c + c % 8, c being each entry's column in its tile, rising within a row.
  const std::int16_t* places = nullptr;
  const std::int32_t* run_order = nullptr;     // (runs of eight rows,) long ones first
  const std::int32_t* tile_offsets = nullptr;  // (rows, tiles + 1), see cuda_tile_offsets

  // (columns, batch) by these strides. 16-bit ones have a batch stride of 1, and each column begins
  // at a multiple of 16 bytes.
  const void* gathered = nullptr;
  std::int64_t gathered_column_stride = 0, gathered_batch_stride = 0;

  const void* values = nullptr;  // (kept,)
  const void* bias = nullptr;    // (rows,) or null
  bool relu = false;
  void* product = nullptr;  // (rows, batch) by these strides, or null
  std::int64_t product_row_stride = 0, product_batch_stride = 0;

  const void* held = nullptr;  // (rows, batch)
  void* sampled = nullptr;     // (splits, kept), still to be summed, or null; float64 for float64,
  std::int64_t splits = 0;     // else float32. See cuda_splits
};

// At least one, so that a weight without columns still gives its bias.
__host__ __device__ constexpr std::int64_t cuda_tiles(std::int64_t columns, std::int64_t tile) {
  return columns > tile ? cuda::divide_up(columns, tile) : 1;
}

// How many columns are best staged at a time.
Status cuda_tile(std::int64_t columns, cuda::Queue queue, std::int64_t* tile);

// In how many parts of the batch a sampled product is summed.
std::int64_t cuda_splits(DType dtype, std::int64_t batch);

// Where each row's entries of each tile begin: (rows, cuda_tiles + 1).
Status cuda_tile_offsets(std::int64_t rows, std::int64_t columns, std::int64_t tile,
                         const std::int32_t* row_offsets, const std::int32_t* column_indices,
                         std::int32_t* offsets, cuda::Queue queue);

Status cuda_walk(const CudaWalk& walk, cuda::Queue queue);

}  // namespace jacpot::masked_matmul
