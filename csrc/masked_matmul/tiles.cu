// How a walk is cut into tiles of columns.

#include "masked_matmul/masked_matmul_cuda.hpp"

namespace jacpot::masked_matmul {
namespace {

using namespace cuda;

__global__ void find_tiles(std::int64_t rows, std::int64_t tiles, std::int64_t tile,
                           const std::int32_t* row_offsets, const std::int32_t* column_indices,
                           std::int32_t* offsets) {
  const std::int64_t at = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= rows * (tiles + 1)) return;
  const std::int64_t row = at / (tiles + 1), from = at % (tiles + 1) * tile;
  std::int32_t low = row_offsets[row], high = row_offsets[row + 1];
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (column_indices[middle] < from)
      low = middle + 1;
    else
      high = middle;
  }
  offsets[at] = low;
}

}  // namespace

Status cuda_tile(std::int64_t columns, cuda::Queue queue, std::int64_t* tile) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const std::int64_t room =
      smaller<std::int64_t>(limits.shared_bytes / 2 / walk_column_bytes, most_tile_columns);
  *tile = larger<std::int64_t>(
      1, divide_up(columns, larger<std::int64_t>(1, divide_up(columns, room))));
  return {};
}

Status cuda_tile_offsets(std::int64_t rows, std::int64_t columns, std::int64_t tile,
                         const std::int32_t* row_offsets, const std::int32_t* column_indices,
                         std::int32_t* offsets, cuda::Queue queue) {
  if (tile < 1) return {Code::invalid_argument, "a tile must have at least one column"};
  const std::int64_t tiles = cuda_tiles(columns, tile), count = rows * (tiles + 1);
  if (count == 0) return {};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  constexpr int block = 256;
  if (divide_up(count, block) > INT32_MAX) return {Code::overflow, "too many rows for a launch"};
  return launch(&find_tiles, dim3(static_cast<unsigned>(divide_up(count, block))), dim3(block), 0,
                queue, rows, tiles, tile, row_offsets, column_indices, offsets);
}

}  // namespace jacpot::masked_matmul
