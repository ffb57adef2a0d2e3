// A block takes 64 of the batch and as many as 16 warps of four windows, whose sums stay in
// registers: 512 rows. While warps multiply what is there of the columns, all threads bring the
// next tile to shared memory, 128 bytes of batch per column. From a batch that lies column by
// column they are copied; from one row by row, a thread turns eight columns of eight examples
// around.
//
// The bound is shared memory, as in masked_matmul.cu: a useful product of 16-bit numbers takes two
// bytes of the 128 that a multiprocessor reads a clock. For sixteen entries and 64 of the batch
// those are 16 clocks, beside which there are 37 instructions of a warp (on sm_90), of which it
// begins four a clock, 8 clocks of tensor cores, and 64 bytes from the L2 cache.

#include "masked_matmul/slots_cuda.hpp"

#include <cstring>

#include "common/cuda_mma.cuh"
#include "masked_matmul/masked_matmul_cuda.hpp"

namespace jacpot::masked_matmul {
namespace {

using namespace cuda;

constexpr int most_warps = 16, threads = most_warps * 32;
constexpr int windows = static_cast<int>(windows_of_warp);
constexpr int panel = 64;  // of the batch
constexpr int eight = 8;   // numbers of 16 bytes, pieces of a panel, banks
constexpr int ring = static_cast<int>(tiles_there);
constexpr std::int64_t column_bytes = panel * 2;
static_assert(eight == slot_banks && eight == window_rows);
constexpr std::int64_t most_tile = threads;  // a thread turns one piece around

template <class T>
struct Arguments {
  int rows, columns, batch, tile, tiles;
  const std::uint8_t* rotations;
  int warps, warps_of_block;
  const std::int32_t* windows;
  const std::int32_t* begins;
  const std::uint32_t* words;
  const T* gathered;
  std::int64_t column_stride, gathered_batch_stride;
  const T* bias;
  bool relu;
  T* product;
  std::int64_t row_stride, batch_stride;
};

template <class T>
__device__ __forceinline__ std::uint32_t bits(T x) {
  std::uint16_t out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

template <class T>
struct alignas(4) Pair {
  T value[2];
};

// An entry's place, with its value above.
template <class T>
__global__ void join(std::int64_t slots, const std::int16_t* places, const std::int32_t* sources,
                     const T* values, std::uint32_t* words) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= slots) return;
  const std::int32_t source = sources[i];
  words[i] = static_cast<std::uint32_t>(places[i]) | (source < 0 ? 0 : bits(values[source]) << 16);
}

// Where the i-th of eight columns lies among them, and a column's piece of the panel in shared
// memory: eight columns that differ in their places modulo eight never meet in a bank.
__device__ __forceinline__ int rotated(int i, int rotation) { return (i + rotation) % eight; }
__device__ __forceinline__ int pack_of(int place, int piece) {
  return place * eight + (piece ^ place % eight);
}

// Starts the copies of a tile of columns and the batch from `n0`, zeros past its end.
template <class T>
__device__ __forceinline__ void copy_tile(const Arguments<T>& w, Pack<T>* staged, int t, int n0) {
  const int base = t * w.tile;
  const int count = smaller(w.tile, w.columns - base) * eight;
  for (int q = static_cast<int>(threadIdx.x); q < count; q += threads) {
    const int column = q / eight, piece = q % eight;
    const int place =
        column / eight * eight + rotated(column % eight, w.rotations[(base + column) / eight]);
    const bool there = n0 + piece * eight < w.batch;
    copy_async(staged + pack_of(place, piece),
               w.gathered + (there ? w.column_stride * (base + column) + n0 + piece * eight : 0),
               there ? 16 : 0);
  }
}

// Eight columns of two examples, from where a row of the batch is contiguous: a thread has them in
// registers while they are on their way. Four rounds make a tile, in an order in which neighbours
// write to different banks.
template <class T>
struct Turned {
  Pack<T> row[2];
  int octet, piece, pair;
  bool there;

  __device__ __forceinline__ void load(const Arguments<T>& w, int t, int n0, int round) {
    const int thread = thread_anew();
    octet = thread / eight;
    piece = thread % eight;
    pair = round ^ octet % 4;
    const int column = t * w.tile + octet * eight;
    there = octet * eight < w.tile && column < w.columns;
    const int n = n0 + piece * eight + pair * 2;
    const T* from = w.gathered + w.gathered_batch_stride * n + column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = {};
      if (there && n + i < w.batch)
        row[i] = *reinterpret_cast<const Pack<T>*>(from + i * w.gathered_batch_stride);
    }
  }

  __device__ __forceinline__ void store(const Arguments<T>& w, Pack<T>* staged, int t) const {
    if (!there) return;
    const int rotation = w.rotations[t * w.tile / eight + octet];
#pragma unroll
    for (int i = 0; i < eight; ++i) {
      Pack<T>* to = staged + pack_of(octet * eight + rotated(i, rotation), piece);
      reinterpret_cast<Pair<T>*>(to)[pair] = {row[0].value[i], row[1].value[i]};
    }
  }
};
static_assert(windows == 4 && eight == 4 * 2, "a round for each window");

using Sums = float[panel / mma_rows][4];  // of a window, 64 of the batch and 8 rows

// One block as a lane takes it: the four entries of its part of the matrix of values, and the one
// whose column it addresses.
struct Block {
  Pack<std::uint32_t> entries;
  std::uint32_t addressed;
};

// Where a lane reads blocks, one after the other.
struct Reader {
  const Pack<std::uint32_t>* entries;
  const std::uint32_t* addressed;

  __device__ __forceinline__ Reader(const std::uint32_t* words, int lane) {
    const int k = lane % 8 + lane / 16 * 8;
    entries = reinterpret_cast<const Pack<std::uint32_t>*>(words) + lane % 4;
    addressed = words + k % 8 / 2 * 4 + k / 8 * 2 + k % 2;
  }
  __device__ __forceinline__ Block next() {
    const Block out{*entries, *addressed};
    entries += block_slots / 4;
    addressed += block_slots;
    return out;
  }
};

// The values of two entries that are in row `row` of their window, else zero.
__device__ __forceinline__ std::uint32_t values_of(std::uint32_t first, std::uint32_t second,
                                                   std::uint32_t row) {
  const std::uint32_t low = ((first ^ row) & 7) == 0 ? first : 0;
  const std::uint32_t high = ((second ^ row) & 7) == 0 ? second : 0;
  return upper_halves(low, high);
}

// `pieces` is where a lane would read the first 16 of the batch of place 0.
template <class T>
__device__ __forceinline__ void multiply(const Block& block, SharedAddress pieces, int lane,
                                         Sums& sums) {
  const auto row = static_cast<std::uint32_t>(lane / 4);
  const auto& e = block.entries.value;
  const std::uint32_t values[2] = {values_of(e[0], e[1], row), values_of(e[2], e[3], row)};
  const SharedAddress column = pieces + (block.addressed & 0x7ff8) * (column_bytes / window_rows);
#pragma unroll
  for (int i = 0; i < panel / mma_rows; ++i) {
    std::uint32_t examples[4];
    load_transposed(examples, column ^ i * 32);  // pieces 2i and 2i + 1 of the column
    mma<T>(sums[i], examples, values);
  }
}

template <class T>
__device__ __forceinline__ void write(const Arguments<T>& w, std::int32_t window, int n0, int lane,
                                      const Sums& sums) {
  const int r = window * static_cast<int>(window_rows) + mma_column(lane, 0);
  if (r >= w.rows) return;
  const bool two = r + 1 < w.rows;
  const bool paired = two && w.row_stride == 1 && w.batch_stride % 2 == 0 &&
                      reinterpret_cast<std::uintptr_t>(w.product) % 4 == 0;
  float bias[2] = {0, 0};
  if (w.bias) {
    bias[0] = to_float(w.bias[r]);
    if (two) bias[1] = to_float(w.bias[r + 1]);
  }
#pragma unroll
  for (int i = 0; i < panel / mma_rows; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = n0 + i * mma_rows + mma_row(lane, half * 2);
      if (n >= w.batch) continue;
      Pair<T> out;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = sums[i][half * 2 + j] + bias[j];
        if (w.relu && sum < 0) sum = 0;  // keeps NaN
        from_float(sum, out.value + j);
      }
      T* to = w.product + r * w.row_stride + n * w.batch_stride;
      if (paired) {
        *reinterpret_cast<Pair<T>*>(to) = out;
      } else {
        to[0] = out.value[0];
        if (two) to[w.row_stride] = out.value[1];
      }
    }
}

// ByColumn: the batch of a column is contiguous; else the columns of an example are.
template <class T, bool ByColumn>
__global__ __launch_bounds__(threads, 1) void multiply_windows(const Arguments<T> w) {
  Pack<T>* staged = shared_memory<Pack<T>>();  // (4 tiles + 8 columns of zeros, 8 pieces)
  const int warp_of_block = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int n0 = static_cast<int>(blockIdx.x) * panel;
  const int warp_index = static_cast<int>(blockIdx.y) * w.warps_of_block + warp_of_block;
  const bool works = warp_of_block < w.warps_of_block && warp_index < w.warps;
  const auto tile_at = [&](int t) { return staged + t % ring * w.tile * eight; };
  // Slots without an entry read zeros.
  if (threadIdx.x < eight * eight)
    staged[ring * w.tile * eight + static_cast<int>(threadIdx.x)] = Pack<T>{};
  if constexpr (ByColumn) {
    copy_tile(w, staged, 0, n0);
    copies_commit();
  } else {
    for (int i = 0; i < windows; ++i) {
      Turned<T> turned;
      turned.load(w, 0, n0, i);
      turned.store(w, staged, 0);
    }
  }

  Sums sums[windows]{};
  const std::int32_t* begins =
      w.begins + (works ? std::int64_t{warp_index} * w.tiles * windows : 0);
  int block = begins[0];
  const SharedAddress pieces = shared_address(staged) + (lane / 8 % 2 ^ lane % 8) * 16;
  // Two blocks are on their way while one is multiplied: they come from the L2 cache. There is
  // room to read behind the last ones.
  Reader reader(w.words + std::int64_t{block} * block_slots, lane);
  Block now = reader.next(), next = reader.next();
  for (int t = 0; t < w.tiles; ++t) {
    if constexpr (ByColumn) copies_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one that the next replaces
    const bool more = t + 1 < w.tiles;
    if constexpr (ByColumn) {
      if (more) copy_tile(w, tile_at(t + 1), t + 1, n0);
      copies_commit();
    }
#pragma unroll
    for (int i = 0; i < windows; ++i) {
      [[maybe_unused]] Turned<T> turned;
      if constexpr (!ByColumn)
        if (more) turned.load(w, t + 1, n0, i);
      const int end = works ? begins[t * windows + i + 1] : block;
      for (; block < end; ++block) {
        const Block after = reader.next();
        multiply<T>(now, pieces, lane, sums[i]);
        now = next;
        next = after;
      }
      if constexpr (!ByColumn)
        if (more) turned.store(w, tile_at(t + 1), t + 1);
    }
  }
  if (!works) return;
#pragma unroll
  for (int i = 0; i < windows; ++i)
    write(w, w.windows[warp_index * windows + i], n0, lane, sums[i]);
}

// How many warps of a block multiply. Many share what is staged, few leave no multiprocessor idle.
int best_share(std::int64_t panels, std::int64_t warps, std::int64_t columns, std::int64_t slots,
               int multiprocessors) {
  constexpr double clocks_of_column = 4.5, clocks_of_slot = 1.25;  // see _fastest in Python
  const double own =
      static_cast<double>(slots) / static_cast<double>(larger<std::int64_t>(1, warps));
  int best = most_warps;
  double least = 0;
  for (int share = most_warps; share >= 2; share /= 2) {
    const std::int64_t blocks = panels * divide_up(warps, share);
    const double time =
        static_cast<double>(divide_up(blocks, multiprocessors)) *
        (static_cast<double>(columns) * clocks_of_column + share * own * clocks_of_slot);
    if (share == most_warps || time < least) {
      best = share;
      least = time;
    }
  }
  return best;
}

template <class T>
Status run(const CudaSlots& s, cuda::Queue queue) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  const std::int64_t panels = divide_up(s.batch, panel);
  const int share = best_share(panels, s.warps, s.columns, s.slots, limits.multiprocessors);
  const std::int64_t groups = divide_up(s.warps, share), joins = divide_up(s.slots, threads);
  const std::int64_t largest = larger(larger(s.slots, s.rows), larger(s.columns, s.batch));
  if (groups > 65535 || largest > INT32_MAX - 2 * threads)
    return {Code::overflow, "the product is too large for one launch"};
  if (s.slots > 0) {
    const Status status =
        launch(&join<T>, dim3(static_cast<unsigned>(joins)), dim3(threads), 0, queue, s.slots,
               s.places, s.sources, static_cast<const T*>(s.values), s.words);
    if (!status.ok()) return status;
  }
  const auto narrow_size = [](std::int64_t size) { return static_cast<int>(size); };
  const Arguments<T> arguments{narrow_size(s.rows),
                               narrow_size(s.columns),
                               narrow_size(s.batch),
                               narrow_size(s.tile),
                               narrow_size(cuda_tiles(s.columns, s.tile)),
                               s.rotations,
                               narrow_size(s.warps),
                               share,
                               s.windows,
                               s.begins,
                               s.words,
                               static_cast<const T*>(s.gathered),
                               s.column_stride,
                               s.gathered_batch_stride,
                               static_cast<const T*>(s.bias),
                               s.relu,
                               static_cast<T*>(s.product),
                               s.row_stride,
                               s.batch_stride};
  const bool by_column = s.gathered_batch_stride == 1;
  return launch(by_column ? &multiply_windows<T, true> : &multiply_windows<T, false>,
                dim3(static_cast<unsigned>(panels), static_cast<unsigned>(groups)), dim3(threads),
                (tiles_there * s.tile + eight) * column_bytes, queue, arguments);
}

}  // namespace

Status cuda_slot_tile(std::int64_t columns, cuda::Queue queue, std::int64_t* tile) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const std::int64_t room =
      smaller((limits.shared_bytes / column_bytes - eight) / tiles_there, most_tile);
  *tile =
      larger<std::int64_t>(eight, smaller(room / eight * eight, divide_up(columns, eight) * eight));
  return {};
}

Status cuda_multiply_slots(const CudaSlots& slots, cuda::Queue queue) {
  if (slots.rows == 0 || slots.batch == 0) return {};
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const bool by_column = slots.gathered_batch_stride == 1 && slots.column_stride % eight == 0;
  const bool by_row = slots.column_stride == 1 && slots.gathered_batch_stride % eight == 0 &&
                      slots.columns % eight == 0;
  if (!aligned(slots.gathered) || !aligned(slots.words) || !(by_column || by_row))
    return {Code::invalid_argument,
            "activations must be contiguous in one direction, by eights, and 16-byte aligned"};
  if (slots.tile < eight || slots.tile > most_tile || slots.tile % eight != 0)
    return {Code::invalid_argument, "a tile must have 8 to 512 columns, a multiple of 8"};
  switch (slots.dtype) {
    case DType::bfloat16:
      return run<bfloat16>(slots, queue);
    case DType::float16:
      return run<float16>(slots, queue);
    default:
      return {Code::unsupported, "the dtype is neither bfloat16 nor float16"};
  }
}

}  // namespace jacpot::masked_matmul
