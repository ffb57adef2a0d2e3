#include "common/cuda_device.cuh"
#include "jacobian/gram_cuda.hpp"

namespace jacpot {
namespace {

using namespace cuda;

constexpr int side = 16;   // threads along each edge of a block
constexpr int chunk = 16;  // of the inner index, staged at a time
constexpr int threads = side * side;
constexpr int max_layers = 12;  // of one launch: kernel arguments are limited to 4 KiB

template <class T>
struct Arguments {
  CudaGramLayer<T> layers[max_layers];
  int n_layers;
  bool symmetric, accumulate;
  std::int64_t n, m, width;   // examples; outputs of an example that are rows of their own
  std::int64_t summed;        // outputs that are summed over: K for the trace, else 1
  std::int64_t rows_in_tile;  // whole examples where they fit
  std::int64_t row_example, row_output, column_example, column_output, plane;  // strides of out
  T* out;
};

// A tile is `Tile` rows and columns, that belong to at most `Edge` examples each.
template <class T, int Tile, int Edge>
struct Shared {
  static constexpr int pad = Pack<T>::size;  // keeps rows aligned and moves them to other banks
  T left[chunk * (Tile + pad)];
  T right[chunk * (Tile + pad)];
  T activations[Edge * (Edge + 1)];
  // Where each row or column of the tile begins in a layer's arrays; -1 past the last.
  std::int64_t signal_row[Tile], signal_column[Tile];
  std::int64_t activation_row[Edge], activation_column[Edge];
  int row_example[Tile], column_example[Tile];  // places in `activations`
};

// Which index of a tile the i-th of a thread's own is: fours that 16-byte accesses can load.
template <int Own>
__device__ __forceinline__ int position(int thread, int i) {
  if constexpr (Own >= 4) return i / 4 * (4 * side) + thread * 4 + i % 4;
  return thread * Own + i;
}

template <class T, int Own>
__device__ __forceinline__ void load_own(const T* row, int thread, T (&out)[Own]) {
  constexpr int step = smaller(Pack<T>::size, Own >= 4 ? 4 : 1);
#pragma unroll
  for (int i = 0; i < Own; i += step) {
    if constexpr (step == Pack<T>::size) {
      const auto pack = *reinterpret_cast<const Pack<T>*>(row + position<Own>(thread, i));
#pragma unroll
      for (int j = 0; j < step; ++j) out[i + j] = pack.value[j];
    } else {
      out[i] = row[position<Own>(thread, i)];
    }
  }
}

// One side's rows of a product: base + offsets[row] + d · stride, or columns[d] in place of d.
template <class T>
struct Operand {
  const T* base;
  const std::int64_t* offsets;
  std::int64_t stride;
  const std::int32_t* columns;

  __device__ __forceinline__ T at(int row, std::int64_t d, std::int64_t depth) const {
    const std::int64_t offset = offsets[row];
    if (offset < 0 || d >= depth) return T{};
    return base[offset + (columns ? columns[d] : d) * stride];
  }
};

// Threads follow the inner index where it is contiguous, the rows where these are.
template <class T, int Edge>
__device__ __forceinline__ void fetch(const Operand<T>& from, std::int64_t first,
                                      std::int64_t depth, T (&out)[Edge * chunk / threads]) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < Edge * chunk / threads; ++j) {
    const int e = thread + j * threads;
    out[j] = from.stride == 1 ? from.at(e / chunk, first + e % chunk, depth)
                              : from.at(e % Edge, first + e / Edge, depth);
  }
}

template <class T, int Edge, int Pitch>
__device__ __forceinline__ void put(const Operand<T>& from, T* staged,
                                    const T (&in)[Edge * chunk / threads]) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < Edge * chunk / threads; ++j) {
    const int e = thread + j * threads;
    const int row = from.stride == 1 ? e / chunk : e % Edge;
    const int d = from.stride == 1 ? e % chunk : e / Edge;
    staged[d * Pitch + row] = in[j];
  }
}

// sum[i][j] += Σ_d left[row i, d] · right[column j, d] over an Edge x Edge tile. All threads take
// part; on return the staging area is free.
template <class T, int Edge, int Pitch>
__device__ void multiply(const Operand<T>& left, const Operand<T>& right, std::int64_t depth,
                         T* staged_left, T* staged_right, T (&sum)[Edge / side][Edge / side]) {
  constexpr int own = Edge / side;
  const int y = static_cast<int>(threadIdx.x) / side, x = static_cast<int>(threadIdx.x) % side;
  T next_left[Edge * chunk / threads], next_right[Edge * chunk / threads];
  fetch<T, Edge>(left, 0, depth, next_left);
  fetch<T, Edge>(right, 0, depth, next_right);
  for (std::int64_t d = 0; d < depth; d += chunk) {
    put<T, Edge, Pitch>(left, staged_left, next_left);
    put<T, Edge, Pitch>(right, staged_right, next_right);
    __syncthreads();
    // The next chunk travels while this one is multiplied.
    fetch<T, Edge>(left, d + chunk, depth, next_left);
    fetch<T, Edge>(right, d + chunk, depth, next_right);
    const auto step = [&](int inner) {
      T a[own], b[own];
      load_own<T, own>(staged_left + inner * Pitch, y, a);
      load_own<T, own>(staged_right + inner * Pitch, x, b);
#pragma unroll
      for (int i = 0; i < own; ++i)
#pragma unroll
        for (int j = 0; j < own; ++j) sum[i][j] += a[i] * b[j];
    };
    if (depth - d >= chunk) {
#pragma unroll
      for (int inner = 0; inner < chunk; ++inner) step(inner);
    } else {
      for (int inner = 0; inner < static_cast<int>(depth - d); ++inner) step(inner);
    }
    __syncthreads();
  }
}

template <class T, int Tile, int Edge>
__global__ __launch_bounds__(threads,
                             1) void gram_tile(const __grid_constant__ Arguments<T> arguments) {
  constexpr int own = Tile / side, example_own = Edge / side;
  constexpr int pitch = Tile + Shared<T, Tile, Edge>::pad;
  if (arguments.symmetric && blockIdx.x < blockIdx.y) return;  // written by its mirror image
  auto& shared = *shared_memory<Shared<T, Tile, Edge>>();
  const int y = static_cast<int>(threadIdx.x) / side, x = static_cast<int>(threadIdx.x) % side;
  const std::int64_t width = arguments.width, plane = blockIdx.z;
  const std::int64_t in_tile = arguments.rows_in_tile;
  const std::int64_t row0 = blockIdx.y * in_tile, column0 = blockIdx.x * in_tile;
  const std::int64_t rows = smaller(in_tile, arguments.n * width - row0);
  const std::int64_t columns = smaller(in_tile, arguments.m * width - column0);
  const std::int64_t first_row = row0 / width, first_column = column0 / width;  // examples
  for (int i = static_cast<int>(threadIdx.x); i < Tile; i += threads) {
    // Rows past the last meet signals of zero; their example must only exist.
    const std::int64_t r = smaller<std::int64_t>(i, rows - 1);
    const std::int64_t c = smaller<std::int64_t>(i, columns - 1);
    shared.row_example[i] = static_cast<int>((row0 + r) / width - first_row) * (Edge + 1);
    shared.column_example[i] = static_cast<int>((column0 + c) / width - first_column);
  }

  T total[own][own]{};
  for (int index = 0; index < arguments.n_layers; ++index) {
    const CudaGramLayer<T>& layer = arguments.layers[index];
    __syncthreads();  // the layer before is done with the offsets
    for (int i = static_cast<int>(threadIdx.x); i < Tile; i += threads) {
      const std::int64_t r = row0 + i, c = column0 + i;
      shared.signal_row[i] = i < rows ? r / width * layer.left.signals_example +
                                            (r % width + plane) * layer.left.signals_output
                                      : -1;
      shared.signal_column[i] = i < columns ? c / width * layer.right.signals_example +
                                                  (c % width + plane) * layer.right.signals_output
                                            : -1;
      if (i < Edge) {
        const bool row_there = (first_row + i) * width < row0 + rows;
        const bool column_there = (first_column + i) * width < column0 + columns;
        shared.activation_row[i] =
            row_there ? (first_row + i) * layer.left.activations_example : -1;
        shared.activation_column[i] =
            column_there ? (first_column + i) * layer.right.activations_example : -1;
      }
    }
    __syncthreads();
    // Under a mask the columns of one output unit factorise, those of different units do not.
    const std::int64_t units = layer.row_offsets ? layer.outputs : 1;
    const std::int64_t depth = layer.row_offsets ? 1 : layer.outputs;
    for (std::int64_t t = 0; t < layer.positions; ++t)
      for (std::int64_t s = 0; s < layer.positions; ++s)
        for (std::int64_t o = 0; o < units; ++o) {
          const std::int64_t begin = layer.row_offsets ? layer.row_offsets[o] : 0;
          const std::int64_t inputs =
              layer.row_offsets ? layer.row_offsets[o + 1] - begin : layer.inputs;
          const std::int32_t* kept = layer.row_offsets ? layer.columns + begin : nullptr;
          T products[example_own][example_own]{};
          multiply<T, Edge, pitch>({layer.left.activations + t * layer.left.activations_position,
                                    shared.activation_row, layer.left_input, kept},
                                   {layer.right.activations + s * layer.right.activations_position,
                                    shared.activation_column, layer.right_input, kept},
                                   inputs, shared.left, shared.right, products);
          __syncthreads();  // the products before are used up
#pragma unroll
          for (int i = 0; i < example_own; ++i)
#pragma unroll
            for (int j = 0; j < example_own; ++j)
              shared.activations[position<example_own>(y, i) * (Edge + 1) +
                                 position<example_own>(x, j)] =
                  products[i][j] + (layer.bias ? T(1) : T(0));
          __syncthreads();

          T signals[own][own]{};
          for (std::int64_t k = 0; k < arguments.summed; ++k)
            multiply<T, Tile, pitch>({layer.left.signals + k * layer.left.signals_output +
                                          t * layer.left.signals_position + o,
                                      shared.signal_row, 1, nullptr},
                                     {layer.right.signals + k * layer.right.signals_output +
                                          s * layer.right.signals_position + o,
                                      shared.signal_column, 1, nullptr},
                                     depth, shared.left, shared.right, signals);
#pragma unroll
          for (int i = 0; i < own; ++i) {
            const T* row = shared.activations + shared.row_example[position<own>(y, i)];
#pragma unroll
            for (int j = 0; j < own; ++j)
              total[i][j] += row[shared.column_example[position<own>(x, j)]] * signals[i][j];
          }
        }
  }

  // A tile on the diagonal writes its upper half to both, so that the result is exactly symmetric.
  const bool diagonal = arguments.symmetric && blockIdx.x == blockIdx.y;
#pragma unroll
  for (int i = 0; i < own; ++i)
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int r = position<own>(y, i), c = position<own>(x, j);
      if (r >= rows || c >= columns || (diagonal && r > c)) continue;
      const std::int64_t row = row0 + r, column = column0 + c;
      T* to = arguments.out + plane * arguments.plane + row / width * arguments.row_example +
              row % width * arguments.row_output + column / width * arguments.column_example +
              column % width * arguments.column_output;
      const T value = arguments.accumulate ? *to + total[i][j] : total[i][j];
      *to = value;
      if (arguments.symmetric)
        arguments
            .out[plane * arguments.plane + column / width * arguments.row_example +
                 column % width * arguments.row_output + row / width * arguments.column_example +
                 row % width * arguments.column_output] = value;
    }
}

template <class T, int Tile, int Edge>
Status run(const Arguments<T>& arguments, dim3 grid, cuda::Queue queue) {
  return launch(&gram_tile<T, Tile, Edge>, grid, dim3(threads),
                static_cast<std::int64_t>(sizeof(Shared<T, Tile, Edge>)), queue, arguments);
}

// Registers hold a tile of the result and one of the signals' products: 128 x 128 float32, or
// 64 x 64 float64.
template <class T>
constexpr int tile_of = sizeof(T) == 4 ? 128 : 64;

template <class T>
Status run_width(const Arguments<T>& arguments, dim3 grid, cuda::Queue queue) {
  constexpr int tile = tile_of<T>;
  const std::int64_t examples = arguments.width > tile ? 2 + tile / arguments.width
                                                       : arguments.rows_in_tile / arguments.width;
  if (examples <= 16) return run<T, tile, 16>(arguments, grid, queue);
  if (examples <= 32) return run<T, tile, 32>(arguments, grid, queue);
  if constexpr (tile > 64)
    if (examples <= 64) return run<T, tile, 64>(arguments, grid, queue);
  return run<T, tile, tile>(arguments, grid, queue);
}

}  // namespace

template <class T>
Status cuda_gram(const std::vector<CudaGramLayer<T>>& layers, bool symmetric, std::int64_t n,
                 std::int64_t m, std::int64_t k, CudaGramOutputs outputs, T* out,
                 cuda::Queue queue) {
  if (n == 0 || m == 0 || k == 0) return {};
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  Arguments<T> arguments{};
  const bool full = outputs == CudaGramOutputs::full;
  const std::int64_t planes = outputs == CudaGramOutputs::diagonal ? k : 1;
  arguments.symmetric = symmetric;
  arguments.n = n;
  arguments.m = m;
  arguments.width = full ? k : 1;
  arguments.summed = outputs == CudaGramOutputs::trace ? k : 1;
  arguments.out = out;
  arguments.plane = 1;
  arguments.row_example = full ? k * m * k : m * planes;
  arguments.row_output = m * k;
  arguments.column_example = full ? k : planes;
  arguments.column_output = 1;
  constexpr std::int64_t tile = tile_of<T>;
  const std::int64_t width = arguments.width;
  arguments.rows_in_tile = width > tile ? tile : tile / width * width;
  const std::int64_t grid_rows = divide_up(n * width, arguments.rows_in_tile);
  const std::int64_t grid_columns = divide_up(m * width, arguments.rows_in_tile);
  if (grid_rows > 65535 || planes > 65535 || grid_columns > INT32_MAX)
    return {Code::overflow, "the kernel is too large for one launch: give fewer examples at once"};
  const dim3 grid(static_cast<unsigned>(grid_columns), static_cast<unsigned>(grid_rows),
                  static_cast<unsigned>(planes));
  std::size_t done = 0;
  do {  // once even without layers: the sum of nothing is zero
    arguments.accumulate = done > 0;
    arguments.n_layers = 0;
    while (done < layers.size() && arguments.n_layers < max_layers)
      arguments.layers[arguments.n_layers++] = layers[done++];
    if (const Status status = run_width(arguments, grid, queue); !status.ok()) return status;
  } while (done < layers.size());
  return {};
}

template Status cuda_gram<float>(const std::vector<CudaGramLayer<float>>&, bool, std::int64_t,
                                 std::int64_t, std::int64_t, CudaGramOutputs, float*, cuda::Queue);
template Status cuda_gram<double>(const std::vector<CudaGramLayer<double>>&, bool, std::int64_t,
                                  std::int64_t, std::int64_t, CudaGramOutputs, double*,
                                  cuda::Queue);

}  // namespace jacpot
