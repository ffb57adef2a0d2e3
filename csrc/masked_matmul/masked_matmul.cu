// The bound is shared memory: with unstructured zeros every multiply-add needs a gathered value of
// its own, and a multiprocessor reads 32 of them a clock. What else goes through the same pipe has
// to be little beside that:
//
//   sums      stay in registers while all columns pass by in tiles, 64 registers of each thread
//   staging   of a tile runs while the one before is multiplied, and serves 512 rows
//   entries   (a value and a 16-bit place) serve 256 bytes of the batch, 32 for each of eight lanes
//
// Four rows share a warp. A row that has ended asks for nothing while the others go on. On sm_90 a
// step of four entries is 99 instructions: 40 are loads and multiply-adds of the batch.

#include "masked_matmul/masked_matmul_cuda.hpp"

#include "common/cuda_device.cuh"

namespace jacpot::masked_matmul {
namespace {

using namespace cuda;

constexpr int threads = 512;
constexpr int lanes = 8;  // of one row
constexpr int groups = threads / lanes;
constexpr int chunks = static_cast<int>(walk_column_bytes) / 16;
constexpr int written_pitch =
    groups + 1;  // of a group's row of the product: other banks for each n

template <class T>
constexpr int panel = walk_column_bytes / sizeof(T);  // of the batch
template <class T>
constexpr int width = panel<T> / lanes;  // of that, of one lane: of two chunks

// Rows of a group at most, by what their sums take of a thread's registers. Both products at once
// need more registers for one row, and their partial results allow for fewer blocks side by side.
template <class T>
__host__ __device__ constexpr int most_rows(bool both) {
  return (both ? 32 : 64) * 4 / (width<T> * static_cast<int>(sizeof(accumulator<T>)));
}

template <class T>
struct Arguments {
  std::int64_t columns, kept, batch;
  int rows, runs, tile, tiles;
  int depth;  // rows of a group
  const std::int16_t* places;
  const std::int32_t* run_order;
  const std::int32_t* tile_offsets;
  const T* gathered;
  std::int64_t column_stride, batch_stride;
  bool aligned;  // every column's batch is contiguous and begins at a multiple of 16 bytes
  const T* values;
  const T* bias;
  bool relu;
  T* product;
  std::int64_t product_row_stride, product_batch_stride;
  const T* held;
  accumulator<T>* sampled;
};

// A block's i-th row of a group; -1 where there is none. Sorted by length, runs of rows are dealt
// to the blocks like cards, so that all get alike amounts.
template <class T>
__device__ __forceinline__ int row_of(const Arguments<T>& w, int i, int group) {
  const std::int64_t dealt = std::int64_t{i} * (groups / run_rows) + group / run_rows;
  const std::int64_t at = blockIdx.y + dealt * gridDim.y;
  if (at >= w.runs) return -1;
  const int row = w.run_order[at] * run_rows + group % run_rows;
  return row < w.rows ? row : -1;
}

// Chunks are exchanged by the column's last bits: lanes that stage neighbouring columns would meet
// in one bank otherwise. Lanes that read a column never do.
__device__ __forceinline__ int place(int column, int chunk) {
  return column * chunks + (chunk ^ (column & (lanes - 1)));
}

// Starts the copies of a tile of columns and the batch from `n0`, zeros past its end.
template <class T>
__device__ __forceinline__ void stage(const Arguments<T>& w, Pack<T>* staged, int t,
                                      std::int64_t n0) {
  constexpr int size = Pack<T>::size;
  const std::int64_t base = std::int64_t{t} * w.tile;
  const int columns = static_cast<int>(smaller<std::int64_t>(w.tile, w.columns - base));
  const T* from = w.gathered + base * w.column_stride;
  const int thread = static_cast<int>(threadIdx.x);
  if (w.aligned) {
    for (int q = thread; q < columns * chunks; q += threads) {
      const int column = q / chunks, chunk = q % chunks;
      const std::int64_t n = n0 + chunk * size;
      const std::int64_t left = smaller<std::int64_t>(w.batch - n, size);
      copy_async(staged + place(column, chunk),
                 left > 0 ? from + column * w.column_stride + n : w.gathered,
                 left > 0 ? static_cast<int>(left * sizeof(T)) : 0);
    }
  } else if constexpr (sizeof(T) >= 4) {  // 16 bits at a time cannot be copied
    // Eight neighbouring columns are 32 bytes of a row-major batch. A thread keeps its n.
    const int n = thread / lanes % panel<T>, chunk = n / size;
    const bool there = n0 + n < w.batch;
    int column = thread % lanes + thread / lanes / panel<T> * lanes;
    constexpr int step = threads / panel<T>;  // a multiple of the lanes: chunks stay where they are
    T* to = staged[place(column, chunk)].value + n % size;
    from = there ? from + column * w.column_stride + (n0 + n) * w.batch_stride : w.gathered;
    const std::int64_t stride = there ? step * w.column_stride : 0;
    for (; column < columns; column += step) {
      copy_async<sizeof(T)>(to, from, there ? static_cast<int>(sizeof(T)) : 0);
      to += step * chunks * size;
      from += stride;
    }
  }
}

// Where a lane's k-th element lies in the batch: in its chunk of either half.
template <class T>
__device__ __forceinline__ int in_panel(int lane, int k) {
  constexpr int size = Pack<T>::size;
  return k / size * (panel<T> / 2) + lane * size + k % size;
}

template <class T>
__device__ __forceinline__ void load_held(const Arguments<T>& w, int row, std::int64_t n0, int lane,
                                          accumulator<T> (&out)[width<T>]) {
  constexpr int size = Pack<T>::size;
  const bool aligned = w.batch % size == 0 && reinterpret_cast<std::uintptr_t>(w.held) % 16 == 0;
  const T* from = w.held + row * w.batch;
#pragma unroll
  for (int k = 0; k < width<T>; k += size) {
    const std::int64_t n = n0 + in_panel<T>(lane, k);
    if (aligned && n + size <= w.batch) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + n);
#pragma unroll
      for (int j = 0; j < size; ++j) out[k + j] = widen(pack.value[j]);
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j) out[k + j] = n + j < w.batch ? widen(from[n + j]) : 0;
    }
  }
}

constexpr int quad = 4;  // entries that a row takes at a time

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

// The next four entries of a row, or as many as are left.
template <class T>
struct Quad {
  T value[quad];
  int place[quad];
};

template <class T, bool Product>
__device__ __forceinline__ Quad<T> load_quad(const T* values, const std::int16_t* places,
                                             int left) {
  Quad<T> out{};
#pragma unroll
  for (int j = 0; j < quad; ++j) {
    if (j >= left) continue;
    out.place[j] = places[j];
    if constexpr (Product) out.value[j] = values[j];
  }
  return out;
}

// Adds a row's entries of the staged tile to its sums. All lanes of a warp take part.
template <class T, bool Product, bool Sampled>
__device__ __forceinline__ void walk_entries(const Arguments<T>& w, const Pack<T>* staged, int lane,
                                             int begin, int end, bool first,
                                             const accumulator<T> (&held)[width<T>],
                                             accumulator<T> (&sums)[width<T>]) {
  using A = accumulator<T>;
  constexpr int size = Pack<T>::size;
  const T* values = w.values + begin;
  const std::int16_t* places = w.places + begin;
  [[maybe_unused]] A* sampled = w.sampled + blockIdx.x * w.kept + begin;
  int left = end - begin;
  // As many as its longest row needs: shuffles take all lanes, and a warp has one loop.
  int longest = larger(left, __shfl_xor_sync(full_warp, left, 8));
  longest = larger(longest, __shfl_xor_sync(full_warp, longest, 16));
  Quad<T> next = load_quad<T, Product>(values, places, left);
#pragma unroll 1
  for (; longest > 0; longest -= quad, left -= quad) {
    const Quad<T> now = next;
    next = load_quad<T, Product>(values += quad, places += quad, left - quad);
    [[maybe_unused]] A part[quad]{};
#pragma unroll
    for (int j = 0; j < quad; ++j) {
      if (j >= left) continue;
      const A value = widen(now.value[j]);
      const Pack<T>* from = staged + (now.place[j] ^ lane);
      const Pack<T> x[2] = {from[0], from[lanes]};
#pragma unroll
      for (int k = 0; k < width<T>; ++k) {
        const A element = widen(x[k / size].value[k % size]);
        if constexpr (Product) sums[k] += value * element;
        if constexpr (Sampled) part[j] += held[k] * element;
      }
    }
    if constexpr (Sampled) {
      const A total = sum_quad(part, lane);
      const int j = (lane & 1) * 2 + (lane >> 1 & 1);
      if (lane < quad && j < left) sampled[j] = first ? total : sampled[j] + total;
      sampled += quad;
    }
  }
}

// Writes the sums row by row of each group, through shared memory: in whichever direction the
// product is contiguous, neighbouring threads write neighbours.
template <class T, int Rows>
__device__ __forceinline__ void write(const Arguments<T>& w, accumulator<T>* shared,
                                      std::int64_t n0,
                                      const accumulator<T> (&sums)[Rows][width<T>]) {
  using A = accumulator<T>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, group = thread / lanes;
  const bool along_batch = w.product_batch_stride == 1;
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
    if (i >= w.depth) break;
    __syncthreads();  // what was here has been read
#pragma unroll
    for (int k = 0; k < width<T>; ++k)
      shared[in_panel<T>(lane, k) * written_pitch + group] = sums[i][k];
    __syncthreads();
    for (int q = thread; q < groups * panel<T>; q += threads) {
      const int other = along_batch ? q / panel<T> : q % groups;
      const int n = along_batch ? q % panel<T> : q / groups;
      const int row = row_of(w, i, other);
      if (row < 0 || n0 + n >= w.batch) continue;
      A sum = shared[n * written_pitch + other];
      if (w.bias) sum += widen(w.bias[row]);
      if (w.relu && sum < 0) sum = 0;  // keeps NaN
      w.product[row * w.product_row_stride + (n0 + n) * w.product_batch_stride] = narrow<T>(sum);
    }
  }
}

template <class T, bool Product, bool Sampled>
__global__ __launch_bounds__(threads, 1) void walk_rows(const Arguments<T> w) {
  using A = accumulator<T>;
  constexpr int rows = most_rows<T>(Product && Sampled);
  static_assert(rows <= lanes);
  Pack<T>* staged = shared_memory<Pack<T>>();  // two of (tile, chunks)
  const int buffer = w.tile * chunks;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  // Lane i keeps the i-th row of its group, and where its entries of a tile begin.
  const int own = lane < w.depth ? row_of(w, lane, thread / lanes) : -1;
  const std::int32_t* offsets = w.tile_offsets + std::int64_t{own < 0 ? 0 : own} * (w.tiles + 1);

  for (std::int64_t n0 = std::int64_t{blockIdx.x} * panel<T>; n0 < w.batch;
       n0 += std::int64_t{gridDim.x} * panel<T>) {
    const bool first = n0 == std::int64_t{blockIdx.x} * panel<T>;
    A sums[rows][width<T>]{};
    if (!first) __syncthreads();  // nobody reads shared memory any more
    stage(w, staged, 0, n0);
    copies_commit();
    int next = own < 0 ? 0 : offsets[0];
    for (int t = 0; t < w.tiles; ++t) {
      copies_wait<0>();
      __syncthreads();  // this tile is there, and nobody reads the one before any more
      const int begin = next;
      if (own >= 0) next = offsets[t + 1];
      const Pack<T>* tile = t % 2 == 0 ? staged : staged + buffer;
      if (t + 1 < w.tiles) stage(w, staged + (t + 1) % 2 * buffer, t + 1, n0);
      copies_commit();
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        if (i >= w.depth) break;
        const int from = thread % warp / lanes * lanes + i;  // the lane that keeps this row
        A held[width<T>]{};
        if constexpr (Sampled)
          if (const int row = __shfl_sync(full_warp, own, from); row >= 0)
            load_held(w, row, n0, lane, held);
        walk_entries<T, Product, Sampled>(w, tile, lane, __shfl_sync(full_warp, begin, from),
                                          __shfl_sync(full_warp, next, from), first, held, sums[i]);
      }
    }
    if constexpr (Product) write(w, shared_memory<A>(), n0, sums);
  }
}

// How many rows a group takes. Many share what is staged, few leave no multiprocessor idle: a block
// copies each column once and reads it for as many rows as keep it.
int best_depth(std::int64_t across, std::int64_t runs, double density, int most,
               int multiprocessors) {
  int best = 1;
  double least = 0;
  for (int depth = 1; depth <= most; ++depth) {
    const std::int64_t blocks = across * divide_up(runs, depth * (groups / run_rows));
    const double time =
        static_cast<double>(divide_up(blocks, multiprocessors)) * (1 + groups * depth * density);
    if (depth == 1 || time < least) {
      best = depth;
      least = time;
    }
  }
  return best;
}

template <class T, bool Product, bool Sampled>
Status run(const CudaWalk& walk, cuda::Queue queue) {
  constexpr std::int64_t narrowest = INT32_MAX;
  const std::int64_t tiles = cuda_tiles(walk.columns, walk.tile);
  const std::int64_t across = Sampled ? walk.splits : divide_up(walk.batch, panel<T>);
  const std::int64_t runs = divide_up(walk.rows, run_rows);
  if (walk.kept > narrowest || walk.rows > narrowest || across > narrowest)
    return {Code::overflow, "the product is too large for one launch"};
  const bool aligned = walk.gathered_batch_stride == 1 &&
                       reinterpret_cast<std::uintptr_t>(walk.gathered) % 16 == 0 &&
                       walk.gathered_column_stride % Pack<T>::size == 0;
  if (sizeof(T) < 4 && !aligned)
    return {Code::invalid_argument,
            "16-bit activations must have their batch innermost, each column's at a multiple of 16 "
            "bytes"};
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  const double all = static_cast<double>(walk.rows) * static_cast<double>(walk.columns);
  const int depth = best_depth(across, runs, all > 0 ? static_cast<double>(walk.kept) / all : 0,
                               most_rows<T>(Product && Sampled), limits.multiprocessors);
  const Arguments<T> arguments{walk.columns,
                               walk.kept,
                               walk.batch,
                               static_cast<int>(walk.rows),
                               static_cast<int>(runs),
                               static_cast<int>(walk.tile),
                               static_cast<int>(tiles),
                               depth,
                               walk.places,
                               walk.run_order,
                               walk.tile_offsets,
                               static_cast<const T*>(walk.gathered),
                               walk.gathered_column_stride,
                               walk.gathered_batch_stride,
                               aligned,
                               static_cast<const T*>(walk.values),
                               static_cast<const T*>(walk.bias),
                               walk.relu,
                               static_cast<T*>(walk.product),
                               walk.product_row_stride,
                               walk.product_batch_stride,
                               static_cast<const T*>(walk.held),
                               static_cast<accumulator<T>*>(walk.sampled)};
  const std::int64_t blocks = divide_up(runs, depth * (groups / run_rows));
  if (blocks > 65535) return {Code::overflow, "the product is too large for one launch"};
  constexpr std::int64_t written = panel<T> * written_pitch * sizeof(accumulator<T>);
  const std::int64_t shared = smaller<std::int64_t>(tiles, 2) * walk.tile * walk_column_bytes;
  return launch(&walk_rows<T, Product, Sampled>,
                dim3(static_cast<unsigned>(across), static_cast<unsigned>(blocks)), dim3(threads),
                larger(shared, Product ? written : 0), queue, arguments);
}

template <class T>
Status run_type(const CudaWalk& walk, cuda::Queue queue) {
  if (walk.product && walk.sampled) return run<T, true, true>(walk, queue);
  return walk.product ? run<T, true, false>(walk, queue) : run<T, false, true>(walk, queue);
}

}  // namespace

std::int64_t cuda_splits(DType dtype, std::int64_t batch) {
  const std::int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  constexpr std::int64_t most = 8;
  return larger<std::int64_t>(1, smaller(most, divide_up(batch, walk_column_bytes / size)));
}

Status cuda_walk(const CudaWalk& walk, cuda::Queue queue) {
  if (!walk.product && !walk.sampled) return {};
  if (walk.tile < 1 || walk.tile > most_tile_columns)
    return {Code::invalid_argument, "a tile must have 1 to 2047 columns"};
  if (walk.sampled && walk.splits != cuda_splits(walk.dtype, walk.batch))
    return {Code::invalid_argument, "the splits must be those of cuda_splits"};
  if (walk.rows == 0 || walk.batch == 0) return {};
  switch (walk.dtype) {
    case DType::float32:
      return run_type<float>(walk, queue);
    case DType::float64:
      return run_type<double>(walk, queue);
    case DType::bfloat16:
      return run_type<bfloat16>(walk, queue);
    case DType::float16:
      return run_type<float16>(walk, queue);
    default:
      return {Code::unsupported, "the dtype is no floating point type"};
  }
}

}  // namespace jacpot::masked_matmul
