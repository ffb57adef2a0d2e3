// The bound is shared memory: with unstructured zeros every multiply-add needs one gathered value.
// So a block stages a tile of `gathered` in shared memory, 128 bytes of batch per column, and
// eight lanes read a column's 128 bytes as 16 bytes each, without bank conflicts whatever the
// column. Four rows share a warp. Rows come sorted by length, so that the four end together.

#include "masked_matmul/masked_matmul_cuda.hpp"

#include "common/cuda_device.cuh"

namespace jacpot::masked_matmul {
namespace {

using namespace cuda;

constexpr int lanes = 8;  // of one row: 8 x 16 bytes
constexpr int max_threads = 512;
constexpr int quad = 4;  // kept entries that a row takes at a time, in 16-byte accesses
constexpr std::int64_t column_bytes = lanes * 16;

template <class T>
struct Arguments {
  std::int64_t rows, columns, kept, batch, tile;
  const std::int32_t* column_indices;
  const std::int32_t* row_order;
  const std::int64_t* tile_offsets;
  const T* gathered;
  std::int64_t column_stride, batch_stride;
  const T* values;
  const T* bias;
  bool relu;
  accumulator<T>* product;
  const T* held;
  accumulator<T>* sampled;
};

// Lanes that write neighbouring columns would meet in one bank without the exchange of chunks.
__device__ __forceinline__ int place(int column, int chunk) {
  return column * lanes + (chunk ^ (column & (lanes - 1)));
}

template <class T>
__device__ __forceinline__ Pack<T> zero_pack() {
  Pack<T> pack;
  for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = T{};
  return pack;
}

// Brings columns [base, base + columns) of the batch from `n0` into shared memory, zeros past its
// end. Consecutive threads follow whichever direction is contiguous.
template <class T>
__device__ void stage(const Arguments<T>& w, Pack<T>* staged, std::int64_t base, int columns,
                      std::int64_t n0) {
  constexpr int width = Pack<T>::size;
  const bool batch_contiguous = w.batch_stride == 1;
  const bool aligned = batch_contiguous && reinterpret_cast<std::uintptr_t>(w.gathered) % 16 == 0 &&
                       w.column_stride % width == 0;
  const int count = columns * lanes;
  for (int q = static_cast<int>(threadIdx.x); q < count; q += static_cast<int>(blockDim.x)) {
    const int column = batch_contiguous ? q / lanes : q % columns;
    const int chunk = batch_contiguous ? q % lanes : q / columns;
    const std::int64_t n = n0 + chunk * width;
    const std::int64_t left = w.batch - n;
    Pack<T>* to = staged + place(column, chunk);
    const T* from = w.gathered + (base + column) * w.column_stride + n * w.batch_stride;
    if (aligned && left > 0) {
      copy_async(to, from, static_cast<int>(smaller<std::int64_t>(left, width) * sizeof(T)));
    } else {
      Pack<T> pack = zero_pack<T>();
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (k < left) pack.value[k] = from[k * w.batch_stride];
      *to = pack;
    }
  }
  copies_commit();
  copies_wait<0>();
}

// A row's piece of the batch, 16 bytes at a time where the row length allows, zeros past its end.
template <class From, class To, int Width>
__device__ __forceinline__ void load_batch(const From* row, std::int64_t n, std::int64_t batch,
                                           bool aligned, To (&out)[Width]) {
  constexpr int step = Pack<From>::size;
#pragma unroll
  for (int k = 0; k < Width; k += step) {
    if (aligned && n + k + step <= batch) {
      const Pack<From> pack = *reinterpret_cast<const Pack<From>*>(row + n + k);
#pragma unroll
      for (int j = 0; j < step; ++j) out[k + j] = widen(pack.value[j]);
    } else {
#pragma unroll
      for (int j = 0; j < step; ++j) out[k + j] = n + k + j < batch ? widen(row[n + k + j]) : To{};
    }
  }
}

template <class A, int Width>
__device__ __forceinline__ void store_batch(A* row, std::int64_t n, std::int64_t batch,
                                            bool aligned, const A (&values)[Width]) {
  constexpr int step = Pack<A>::size;
#pragma unroll
  for (int k = 0; k < Width; k += step) {
    if (aligned && n + k + step <= batch) {
      Pack<A> pack;
#pragma unroll
      for (int j = 0; j < step; ++j) pack.value[j] = values[k + j];
      *reinterpret_cast<Pack<A>*>(row + n + k) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < step; ++j)
        if (n + k + j < batch) row[n + k + j] = values[k + j];
    }
  }
}

// Sums each of the four values over the eight lanes of a row. Lane l gets the sum of number
// (l & 1) * 2 + (l >> 1 & 1): halves are exchanged, so that it takes four shuffles, not twelve.
template <class A>
__device__ __forceinline__ A sum_quad(const A (&part)[quad], int lane) {
  const bool odd = (lane & 1) != 0;
  const A low = __shfl_xor_sync(full_warp, odd ? part[0] : part[2], 1);
  const A high = __shfl_xor_sync(full_warp, odd ? part[1] : part[3], 1);
  const A first = (odd ? part[2] : part[0]) + low;
  const A second = (odd ? part[3] : part[1]) + high;
  const bool upper = (lane & 2) != 0;
  const A other = __shfl_xor_sync(full_warp, upper ? first : second, 2);
  const A one = (upper ? second : first) + other;
  return one + __shfl_xor_sync(full_warp, one, 4);
}

template <class T>
struct Quad {
  int column[quad];  // within the tile; the row of zeros where there is no entry
  accumulator<T> value[quad];
};

template <class T, bool Product>
__device__ __forceinline__ Quad<T> load_quad(const Arguments<T>& w, std::int64_t e,
                                             std::int64_t begin, std::int64_t end,
                                             std::int64_t base) {
  Quad<T> out;
  const bool whole = e >= begin - (quad - 1) && e < end && e + quad <= w.kept;
  Pack<std::int32_t> columns{};
  T values[quad]{};
  if (whole) {
    columns = *reinterpret_cast<const Pack<std::int32_t>*>(w.column_indices + e);
    if constexpr (Product) {
      struct alignas(quad * sizeof(T) < 16 ? quad * sizeof(T) : 16) Values {
        T value[quad];
      };
      const Values four = *reinterpret_cast<const Values*>(w.values + e);
#pragma unroll
      for (int j = 0; j < quad; ++j) values[j] = four.value[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < quad; ++j) {
      if (e + j < begin || e + j >= end) continue;
      columns.value[j] = w.column_indices[e + j];
      if constexpr (Product) values[j] = w.values[e + j];
    }
  }
#pragma unroll
  for (int j = 0; j < quad; ++j) {
    // A staged infinity times a value of zero would be NaN: a missing entry meets zeros instead.
    const bool present = e + j >= begin && e + j < end;
    out.column[j] = present ? static_cast<int>(columns.value[j] - base) : static_cast<int>(w.tile);
    out.value[j] = present ? widen(values[j]) : accumulator<T>{};
  }
  return out;
}

template <class T, bool Product, bool Sampled>
__global__ __launch_bounds__(max_threads, 2) void walk_rows(const Arguments<T> w) {
  using A = accumulator<T>;
  constexpr int width = Pack<T>::size;
  Pack<T>* staged = shared_memory<Pack<T>>();  // (tile + 1, lanes), the last column zero
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const std::int64_t group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const std::int64_t tiles = cuda_tiles(w.columns, w.tile);
  const std::int64_t panels = divide_up(w.batch, lanes * width);
  const bool product_aligned = w.batch % Pack<A>::size == 0;
  const bool held_aligned =
      w.batch % width == 0 && reinterpret_cast<std::uintptr_t>(w.held) % 16 == 0;
  if (threadIdx.x < lanes) staged[w.tile * lanes + lane] = zero_pack<T>();

  for (std::int64_t p = blockIdx.x; p < panels; p += gridDim.x) {
    const std::int64_t n = p * lanes * width + lane * width;
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t base = t * w.tile;
      __syncthreads();  // the tile before is no longer read
      stage(w, staged, base, static_cast<int>(smaller(w.tile, w.columns - base)),
            p * lanes * width);
      __syncthreads();
      for (std::int64_t first = blockIdx.y * groups; first < w.rows; first += gridDim.y * groups) {
        const bool active = first + group < w.rows;
        const std::int64_t row = active ? w.row_order[first + group] : 0;
        const std::int64_t* offsets = w.tile_offsets + row * (tiles + 1) + t;
        const std::int64_t begin = active ? offsets[0] : 0, end = active ? offsets[1] : 0;

        A sum[width]{}, held[width]{};
        if constexpr (Product) {
          if (active && t > 0) {
            load_batch(w.product + row * w.batch, n, w.batch, product_aligned, sum);
          } else if (active && w.bias) {
            const A bias = widen(w.bias[row]);
#pragma unroll
            for (int k = 0; k < width; ++k) sum[k] = bias;
          }
        }
        if constexpr (Sampled)
          if (active) load_batch(w.held + row * w.batch, n, w.batch, held_aligned, held);

        // Every row of the warp takes as many steps as its longest: shuffles need all lanes.
        std::int64_t e = begin / quad * quad;
        int steps = begin < end ? static_cast<int>(divide_up(end - e, quad)) : 0;
        steps = larger(steps, __shfl_xor_sync(full_warp, steps, 8));
        steps = larger(steps, __shfl_xor_sync(full_warp, steps, 16));
        for (int s = 0; s < steps; ++s, e += quad) {
          const Quad<T> q = load_quad<T, Product>(w, e, begin, end, base);
          [[maybe_unused]] A part[quad]{};
#pragma unroll
          for (int j = 0; j < quad; ++j) {
            const Pack<T> x = staged[place(q.column[j], lane)];
#pragma unroll
            for (int k = 0; k < width; ++k) {
              if constexpr (Product) sum[k] += q.value[j] * widen(x.value[k]);
              if constexpr (Sampled) part[j] += held[k] * widen(x.value[k]);
            }
          }
          if constexpr (Sampled) {
            const A total = sum_quad(part, lane);
            const std::int64_t at = e + (lane & 1) * 2 + (lane >> 1 & 1);
            if (lane < 4 && at >= begin && at < end) {
              A* to = w.sampled + blockIdx.x * w.kept + at;
              *to = p == blockIdx.x ? total : *to + total;
            }
          }
        }
        if constexpr (Product) {
          if (w.relu && t + 1 == tiles) {
#pragma unroll
            for (int k = 0; k < width; ++k) sum[k] = sum[k] < 0 ? A{} : sum[k];  // keeps NaN
          }
          if (active) store_batch(w.product + row * w.batch, n, w.batch, product_aligned, sum);
        }
      }
    }
  }
}

__global__ void find_tiles(std::int64_t rows, std::int64_t tiles, std::int64_t tile,
                           const std::int32_t* row_offsets, const std::int32_t* column_indices,
                           std::int64_t* offsets) {
  const std::int64_t at = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= rows * (tiles + 1)) return;
  const std::int64_t row = at / (tiles + 1), from = at % (tiles + 1) * tile;
  std::int64_t low = row_offsets[row], high = row_offsets[row + 1];
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (column_indices[middle] < from)
      low = middle + 1;
    else
      high = middle;
  }
  offsets[at] = low;
}

template <class T, bool Product, bool Sampled>
Status run(const CudaWalk& walk, cuda::Queue queue, int threads, dim3 grid) {
  const Arguments<T> arguments{walk.rows,
                               walk.columns,
                               walk.kept,
                               walk.batch,
                               walk.tile,
                               walk.column_indices,
                               walk.row_order,
                               walk.tile_offsets,
                               static_cast<const T*>(walk.gathered),
                               walk.gathered_column_stride,
                               walk.gathered_batch_stride,
                               static_cast<const T*>(walk.values),
                               static_cast<const T*>(walk.bias),
                               walk.relu,
                               static_cast<accumulator<T>*>(walk.product),
                               static_cast<const T*>(walk.held),
                               static_cast<accumulator<T>*>(walk.sampled)};
  return launch(&walk_rows<T, Product, Sampled>, grid, dim3(static_cast<unsigned>(threads)),
                (walk.tile + 1) * column_bytes, queue, arguments);
}

int threads_for(std::int64_t rows) {
  return static_cast<int>(smaller<std::int64_t>(max_threads, divide_up(rows * lanes, warp) * warp));
}

template <class T>
Status run_type(const CudaWalk& walk, cuda::Queue queue, int threads, dim3 grid) {
  if (walk.wants_product && walk.wants_sampled)
    return run<T, true, true>(walk, queue, threads, grid);
  if (walk.wants_product) return run<T, true, false>(walk, queue, threads, grid);
  return run<T, false, true>(walk, queue, threads, grid);
}

}  // namespace

Status cuda_plan(DType dtype, std::int64_t columns, std::int64_t batch, bool sampled,
                 cuda::Queue queue, std::int64_t* tile, std::int64_t* splits) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  // Two blocks share a multiprocessor: one computes while the other stages.
  constexpr std::int64_t reserved = 1024;
  const std::int64_t room = limits.shared_bytes / 2 - reserved;
  *tile = larger<std::int64_t>(1, smaller(columns, room / column_bytes - 1));
  const std::int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const std::int64_t panels = divide_up(batch, column_bytes / size);
  // Each split of a sampled product writes a result of its own, to be summed after.
  constexpr std::int64_t most_sampled = 8;
  const std::int64_t most = sampled ? most_sampled : 2 * limits.multiprocessors;
  *splits = larger<std::int64_t>(1, smaller(panels, most));
  return {};
}

Status cuda_tile_offsets(std::int64_t rows, std::int64_t columns, std::int64_t tile,
                         const std::int32_t* row_offsets, const std::int32_t* column_indices,
                         std::int64_t* offsets, cuda::Queue queue) {
  if (tile < 1) return {Code::invalid_argument, "a tile must have at least one column"};
  const std::int64_t tiles = cuda_tiles(columns, tile), count = rows * (tiles + 1);
  if (count == 0) return {};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  constexpr int threads = 256;
  if (divide_up(count, threads) > INT32_MAX) return {Code::overflow, "too many rows for a launch"};
  return launch(&find_tiles, dim3(static_cast<unsigned>(divide_up(count, threads))), dim3(threads),
                0, queue, rows, tiles, tile, row_offsets, column_indices, offsets);
}

Status cuda_walk(const CudaWalk& walk, cuda::Queue queue) {
  if (!walk.wants_product && !walk.wants_sampled) return {};
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 != 0;
  };
  if (misaligned(walk.values) || misaligned(walk.column_indices) || misaligned(walk.product))
    return {Code::invalid_argument, "values, column indices and product must be 16-byte aligned"};
  if (walk.tile < 1 || walk.splits < 1)
    return {Code::invalid_argument, "tile and splits must be at least 1"};
  if (walk.rows == 0 || walk.batch == 0) return {};
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  const int threads = threads_for(walk.rows);
  const std::int64_t most_parts = divide_up(walk.rows, threads / lanes);
  const std::int64_t parts =
      larger<std::int64_t>(1, smaller(most_parts, 2 * limits.multiprocessors / walk.splits));
  const dim3 grid(static_cast<unsigned>(walk.splits), static_cast<unsigned>(parts));
  switch (walk.dtype) {
    case DType::float32:
      return run_type<float>(walk, queue, threads, grid);
    case DType::float64:
      return run_type<double>(walk, queue, threads, grid);
    case DType::bfloat16:
      return run_type<bfloat16>(walk, queue, threads, grid);
    case DType::float16:
      return run_type<float16>(walk, queue, threads, grid);
    default:
      return {Code::unsupported, "the dtype is no floating point type"};
  }
}

}  // namespace jacpot::masked_matmul
