// A block takes 64 of the batch and 32 windows, two to each warp, whose sums stay in registers. The
// columns of the weight pass by in tiles: while one is multiplied, the activations of the next are
// copied to shared memory, 128 bytes of batch per column.
//
// Tensor cores read 8 x 8 matrices whose rows are where the vectors' columns say. Eight rows meet
// no bank conflict where their columns differ modulo 8, in which order a block's vectors come.

#include "masked_matmul/vectors_cuda.hpp"

#include "common/cuda_mma.cuh"
#include "masked_matmul/masked_matmul_cuda.hpp"

namespace jacpot::masked_matmul {
namespace {

using namespace cuda;

constexpr int warps = 16, threads = warps * 32;
constexpr int windows_of_warp = 2, windows_of_block = warps * windows_of_warp;
constexpr int panel = 64;  // of the batch
constexpr int chunks = 8;  // of 16 bytes, of a column's piece of the batch
constexpr int chunk = panel / chunks;
constexpr std::int64_t column_bytes = chunks * 16;

template <class T>
struct Arguments {
  std::int64_t rows, columns, batch, tile;
  const std::int16_t* block_columns;
  const std::int64_t* begins;
  const T* values;
  const T* gathered;
  std::int64_t pitch;
  const T* bias;
  bool relu;
  T* product;
  std::int64_t row_stride, batch_stride;
};

template <class T>
__device__ void stage(const Arguments<T>& w, Pack<T>* staged, std::int64_t tile, std::int64_t n0) {
  const std::int64_t base = tile * w.tile;
  const int count = static_cast<int>(smaller(w.tile, w.columns - base)) * chunks;
  for (int q = static_cast<int>(threadIdx.x); q < count; q += threads) {
    const int column = q / chunks, c = q % chunks;
    const std::int64_t n = n0 + c * chunk;
    const bool there = n < w.pitch;
    copy_async(staged + column * chunks + (c ^ (column & (chunks - 1))),
               w.gathered + (base + column) * w.pitch + (there ? n : 0), there ? 16 : 0);
  }
}

// One block's values as a lane holds them, and the column of the vector whose row it addresses.
template <class T>
struct Block {
  std::uint32_t values[4];
  int column;

  __device__ __forceinline__ Block(const Arguments<T>& w, std::int64_t block, int lane) {
    const auto four =
        reinterpret_cast<const Pack<std::uint32_t>*>(w.values + block * block_values)[lane];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = four.value[i];
    column = w.block_columns[block * block_vectors + lane % 16];
  }
};

using Sums = float[panel / mma_columns][4];  // of a window, 16 rows and 64 of the batch

template <class T>
__device__ __forceinline__ void walk(const Arguments<T>& w, const Pack<T>* staged,
                                     std::int64_t begin, std::int64_t end, int lane, Sums& sums) {
  if (begin >= end) return;
  const auto load = [&](std::int64_t block) { return Block<T>(w, smaller(block, end - 1), lane); };
  // Two blocks are on their way while one is multiplied: they come from the L2 cache.
  Block<T> now = load(begin), next = load(begin + 1);
  for (std::int64_t b = begin; b < end; ++b) {
    const Block<T> after = load(b + 2);
    const Pack<T>* row = staged + now.column * chunks;
#pragma unroll
    for (int pair = 0; pair < chunks / 2; ++pair) {
      const int c = pair * 2 + lane / 16;
      std::uint32_t loaded[4];
      load_transposed(loaded, row + (c ^ (now.column & (chunks - 1))));
      mma<T>(sums[pair * 2], now.values, {loaded[0], loaded[1]});
      mma<T>(sums[pair * 2 + 1], now.values, {loaded[2], loaded[3]});
    }
    now = next;
    next = after;
  }
}

template <class T>
__global__ __launch_bounds__(threads, 1) void multiply(const Arguments<T> w) {
  Pack<T>* staged = shared_memory<Pack<T>>();  // two of (tile + 1, chunks), the last row zero
  const std::int64_t buffer_packs = (w.tile + 1) * chunks;
  const int warp_index = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t n0 = std::int64_t{blockIdx.x} * panel;
  const std::int64_t first = std::int64_t{blockIdx.y} * windows_of_block + warp_index;
  const std::int64_t tiles = cuda_tiles(w.columns, w.tile);
  const std::int64_t windows = divide_up(w.rows, window_rows);
  if (threadIdx.x < 2 * chunks) {
    Pack<T> zero{};
    staged[threadIdx.x / chunks * buffer_packs + w.tile * chunks + threadIdx.x % chunks] = zero;
  }

  Sums sums[windows_of_warp]{};
  stage(w, staged, 0, n0);
  copies_commit();
  for (std::int64_t t = 0; t < tiles; ++t) {
    copies_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    if (t + 1 < tiles) stage(w, staged + (t + 1) % 2 * buffer_packs, t + 1, n0);
    copies_commit();
#pragma unroll
    for (int i = 0; i < windows_of_warp; ++i) {
      const std::int64_t window = first + i * warps;
      if (window >= windows) continue;
      const std::int64_t* begins = w.begins + window * (tiles + 1) + t;
      walk(w, staged + t % 2 * buffer_packs, begins[0], begins[1], lane, sums[i]);
    }
  }

#pragma unroll
  for (int i = 0; i < windows_of_warp; ++i)
#pragma unroll
    for (int j = 0; j < panel / mma_columns; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const std::int64_t row = (first + i * warps) * window_rows + mma_row(lane, k);
        const std::int64_t n = n0 + j * mma_columns + mma_column(lane, k);
        if (row >= w.rows || n >= w.batch) continue;
        float sum = sums[i][j][k] + (w.bias ? to_float(w.bias[row]) : 0.0f);
        if (w.relu && sum < 0) sum = 0;  // keeps NaN
        from_float(sum, w.product + row * w.row_stride + n * w.batch_stride);
      }
}

template <class T>
Status run(const CudaVectors& v, cuda::Queue queue) {
  const Arguments<T> arguments{v.rows,
                               v.columns,
                               v.batch,
                               v.tile,
                               v.block_columns,
                               v.begins,
                               static_cast<const T*>(v.values),
                               static_cast<const T*>(v.gathered),
                               v.pitch,
                               static_cast<const T*>(v.bias),
                               v.relu,
                               static_cast<T*>(v.product),
                               v.row_stride,
                               v.batch_stride};
  const std::int64_t panels = divide_up(v.batch, panel);
  const std::int64_t groups = divide_up(divide_up(v.rows, window_rows), windows_of_block);
  if (panels > INT32_MAX || groups > 65535)
    return {Code::overflow, "the product is too large for one launch"};
  return launch(&multiply<T>, dim3(static_cast<unsigned>(panels), static_cast<unsigned>(groups)),
                dim3(threads), 2 * (v.tile + 1) * column_bytes, queue, arguments);
}

}  // namespace

Status cuda_vector_tile(std::int64_t columns, cuda::Queue queue, std::int64_t* tile) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const std::int64_t room = limits.shared_bytes / 2 / column_bytes - 1;
  *tile = larger<std::int64_t>(1, smaller<std::int64_t>(smaller(columns, room), INT16_MAX));
  return {};
}

Status cuda_multiply_vectors(const CudaVectors& vectors, cuda::Queue queue) {
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 != 0;
  };
  if (misaligned(vectors.values) || misaligned(vectors.gathered))
    return {Code::invalid_argument, "values and activations must be 16-byte aligned"};
  if (vectors.tile < 1 || vectors.tile > INT16_MAX)
    return {Code::invalid_argument, "a tile must have 1 to 32767 columns"};
  if (vectors.pitch % chunk != 0 || vectors.pitch < vectors.batch)
    return {Code::invalid_argument, "the pitch must be the batch rounded up to a multiple of 8"};
  if (vectors.rows == 0 || vectors.batch == 0) return {};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  switch (vectors.dtype) {
    case DType::bfloat16:
      return run<bfloat16>(vectors, queue);
    case DType::float16:
      return run<float16>(vectors, queue);
    default:
      return {Code::unsupported, "the dtype is neither bfloat16 nor float16"};
  }
}

}  // namespace jacpot::masked_matmul
