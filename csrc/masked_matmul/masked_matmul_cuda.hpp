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

struct CudaWalk {
  DType dtype = DType::float32;  // of values, gathered, held and bias: any float
  std::int64_t rows = 0, columns = 0, kept = 0, batch = 0;
  const std::int32_t* column_indices = nullptr;  // (kept,) rising within a row, 16-byte aligned
  const std::int32_t* row_order = nullptr;       // (rows,) long rows first: neighbours go together
  const std::int64_t* tile_offsets = nullptr;    // (rows, tiles + 1), see cuda_tile_offsets
  std::int64_t tile = 0;                         // columns that are staged at a time
  std::int64_t splits = 0;                       // parts of the batch that run at once

  const void* gathered = nullptr;  // (columns, batch) by these strides
  std::int64_t gathered_column_stride = 0, gathered_batch_stride = 0;

  bool wants_product = false, wants_sampled = false;

  const void* values = nullptr;  // (kept,) 16-byte aligned
  const void* bias = nullptr;    // (rows,) or null
  bool relu = false;
  void* product = nullptr;  // (rows, batch), float64 for float64, else float32

  const void* held = nullptr;  // (rows, batch)
  void* sampled = nullptr;     // (splits, kept) of the product's type, still to be summed
};

// At least one, so that a weight without columns still gives its bias.
__host__ __device__ constexpr std::int64_t cuda_tiles(std::int64_t columns, std::int64_t tile) {
  return columns > tile ? cuda::divide_up(columns, tile) : 1;
}

// How a walk is best cut for this device: sets tile and splits.
Status cuda_plan(DType dtype, std::int64_t columns, std::int64_t batch, bool sampled,
                 cuda::Queue queue, std::int64_t* tile, std::int64_t* splits);

// Where each row's entries of each tile begin: (rows, cuda_tiles + 1).
Status cuda_tile_offsets(std::int64_t rows, std::int64_t columns, std::int64_t tile,
                         const std::int32_t* row_offsets, const std::int32_t* column_indices,
                         std::int64_t* offsets, cuda::Queue queue);

Status cuda_walk(const CudaWalk& walk, cuda::Queue queue);

}  // namespace jacpot::masked_matmul
