// The product with a very sparse weight in 16 bits, on tensor cores.
//
//   product[r, n] = Σ_c S[r, c] · gathered[c, n]  (+ bias[r], then max(·, 0) with relu)
//
// Sixteen rows of S are a window. A column that holds anything in it is a vector of 16 values, most
// of them zero, and sixteen vectors are a block: one operand of a tensor core, whose other one is
// gathered from the rows of activations that the vectors' columns name. In contrast to the walk of
// masked_matmul_cuda.hpp, a zero of a vector is multiplied: by infinity that is NaN.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"
#include "common/view.hpp"

namespace jacpot::masked_matmul {

inline constexpr std::int64_t window_rows = 16, block_vectors = 16;
inline constexpr std::int64_t block_values = window_rows * block_vectors;

struct CudaVectors {
  DType dtype = DType::bfloat16;  // of values, gathered, bias and product: bfloat16 or float16
  std::int64_t rows = 0, columns = 0, batch = 0;
  std::int64_t tile = 0;                        // columns that are staged at a time
  const std::int16_t* block_columns = nullptr;  // (blocks, 16) in their tile; `tile` where none is
  const std::int64_t* begins = nullptr;  // (windows, tiles + 1): blocks of a window, tile by tile
  // (blocks, 256), 16-byte aligned: value (r, v) of a block lies where the lane of a tensor core
  // that holds it reads it, at 32 (r % 8) + 8 (v % 8 / 2) + 2 (r / 8) + 4 (v / 8) + v % 2.
  const void* values = nullptr;
  const void* gathered = nullptr;  // (columns, pitch), 16-byte aligned
  std::int64_t pitch = 0;          // batch, rounded up to a multiple of 8
  const void* bias = nullptr;      // (rows,) or null
  bool relu = false;
  void* product = nullptr;  // (rows, batch) by these strides
  std::int64_t row_stride = 0, batch_stride = 0;
};

// How many columns of a weight are best staged at a time.
Status cuda_vector_tile(std::int64_t columns, cuda::Queue queue, std::int64_t* tile);

Status cuda_multiply_vectors(const CudaVectors& vectors, cuda::Queue queue);

}  // namespace jacpot::masked_matmul
