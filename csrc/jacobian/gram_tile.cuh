// The kernel of gram_cuda.hpp, over a core that multiplies two tiles.
//
// A core tells the sizes of a tile and of the chunks of the inner index it is staged in, where an
// element of a chunk lies in shared memory, and which elements of a tile of sums a thread owns. Of
// few rows, chunks are long: each costs the time in which memory answers.
// gram.cu has the one of ordinary multiply-adds, gram_tensor.cu that of tensor cores.
#pragma once

#include "common/cuda_device.cuh"
#include "jacobian/gram_cuda.hpp"

namespace jacpot::gram_tiles {

using namespace cuda;

inline constexpr int threads = 256;
inline constexpr int max_layers = 12;  // of one launch: kernel arguments are limited to 4 KiB

template <class T>
struct Arguments {
  GramLayer<T> layers[max_layers];
  int n_layers;
  bool symmetric, accumulate;
  std::int64_t n, m, width;   // examples; outputs of an example that are rows of their own
  std::int64_t summed;        // outputs that are summed over: K for the trace, else 1
  std::int64_t rows_in_tile;  // whole examples where they fit
  std::int64_t planes;        // out is (n·width, m·width, planes)
  T* out;
};

// A tile has Core::tile rows and columns, that belong to at most `Edge` examples each. Chunks are
// staged in two buffers: one fills while the other is multiplied.
template <class Core, int Edge>
struct Shared {
  using T = typename Core::Type;
  static constexpr int pitch = Edge + Core::pad;  // of `activations`
  T left[2][Core::staged], right[2][Core::staged];
  T activations[Edge * pitch];
  // Where each row or column of the tile begins in a layer's arrays; -1 past the last.
  std::int64_t signal_row[Core::tile], signal_column[Core::tile];
  std::int64_t activation_row[Edge], activation_column[Edge];
  int row_example[Core::tile], column_example[Core::tile];  // places in `activations`
};

// One side's rows of a product: base + segment · segment_stride + offsets[row] + d.
template <class T>
struct Operand {
  const T* base;
  const std::int64_t* offsets;
  std::int64_t segment_stride;
  bool aligned;  // every row of every segment begins at a multiple of 16 bytes
};

template <class T>
__device__ __forceinline__ bool at_sixteen_bytes(const T* base, std::int64_t stride,
                                                 std::int64_t other_stride) {
  constexpr std::int64_t size = Pack<T>::size;
  return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && stride % size == 0 &&
         other_stride % size == 0;
}

// Starts the copies of d = first ... first + chunk of `Edge` rows, zeros past the last of either.
template <class Core, int Edge, class T>
__device__ __forceinline__ void stage(const Operand<T>& from, std::int64_t segment,
                                      std::int64_t first, std::int64_t depth, T* staged) {
  constexpr int chunk = Core::template chunk<Edge>;
  const T* base = from.base + segment * from.segment_stride;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (Core::rows_contiguous) {
    if (from.aligned) {
      constexpr int size = Pack<T>::size;
      for (int e = thread; e < Edge * chunk / size; e += threads) {
        const int row = e / (chunk / size), d = e % (chunk / size) * size;
        const std::int64_t offset = from.offsets[row];
        const std::int64_t left = offset < 0 ? 0 : smaller<std::int64_t>(depth - first - d, size);
        copy_async(staged + Core::template place<Edge>(row, d),
                   left > 0 ? base + offset + first + d : from.base,
                   left > 0 ? static_cast<int>(left * sizeof(T)) : 0);
      }
      return;
    }
  }
#pragma unroll 4
  for (int e = thread; e < Edge * chunk; e += threads) {
    const int row = e / chunk, d = e % chunk;
    const std::int64_t offset = from.offsets[row];
    const bool there = offset >= 0 && first + d < depth;
    copy_async<sizeof(T)>(staged + Core::template place<Edge>(row, d),
                          there ? base + offset + first + d : from.base,
                          there ? static_cast<int>(sizeof(T)) : 0);
  }
}

// sums[row, column] += Σ over segments and d of left[row, d] · right[column, d]. All threads take
// part; on return the staging area is free, and what was in shared memory before is seen by all.
template <class Core, int Edge, class T, class Staging>
__device__ __forceinline__ void multiply(const Operand<T>& left, const Operand<T>& right,
                                         std::int64_t depth, std::int64_t segments, Staging& shared,
                                         typename Core::template Sums<Edge>& sums) {
  std::int64_t segment = 0, first = 0;  // of the chunk that is staged next
  const auto stage_next = [&](int buffer) {
    if (segment < segments) {
      stage<Core, Edge>(left, segment, first, depth, shared.left[buffer]);
      stage<Core, Edge>(right, segment, first, depth, shared.right[buffer]);
    }
    copies_commit();
  };
  if (depth <= 0) segments = 0;
  stage_next(0);
  for (int buffer = 0; segment < segments; buffer ^= 1) {
    constexpr int chunk = Core::template chunk<Edge>;
    const int inner = static_cast<int>(smaller<std::int64_t>(chunk, depth - first));
    first += chunk;
    if (first >= depth) {
      first = 0;
      ++segment;
    }
    copies_wait<0>();
    __syncthreads();  // this chunk is there, and nobody reads the one before any more
    stage_next(buffer ^ 1);
    Core::template multiply<Edge>(shared.left[buffer], shared.right[buffer], inner, sums);
  }
  __syncthreads();
}

template <class Core, int Edge>
__global__ __launch_bounds__(threads, 1) void gram_tile(
    const __grid_constant__ Arguments<typename Core::Type> arguments) {
  using T = typename Core::Type;
  using Memory = Shared<Core, Edge>;
  constexpr int tile = Core::tile;
  if (arguments.symmetric && blockIdx.x < blockIdx.y) return;  // written by its mirror image
  auto& shared = *shared_memory<Memory>();
  const std::int64_t width = arguments.width, plane = blockIdx.z;
  const std::int64_t in_tile = arguments.rows_in_tile;
  const std::int64_t row0 = blockIdx.y * in_tile, column0 = blockIdx.x * in_tile;
  const std::int64_t rows = smaller(in_tile, arguments.n * width - row0);
  const std::int64_t columns = smaller(in_tile, arguments.m * width - column0);
  const std::int64_t first_row = row0 / width, first_column = column0 / width;  // examples
  for (int i = static_cast<int>(threadIdx.x); i < tile; i += threads) {
    // Rows past the last meet signals of zero; their example must only exist.
    const std::int64_t r = smaller<std::int64_t>(i, rows - 1);
    const std::int64_t c = smaller<std::int64_t>(i, columns - 1);
    shared.row_example[i] = static_cast<int>((row0 + r) / width - first_row) * Memory::pitch;
    shared.column_example[i] = static_cast<int>((column0 + c) / width - first_column);
  }

  typename Core::template Sums<tile> total{};
  for (int index = 0; index < arguments.n_layers; ++index) {
    const GramLayer<T>& layer = arguments.layers[index];
    for (int i = static_cast<int>(threadIdx.x); i < tile; i += threads) {
      const auto begin = [&](const GramFactors<T>& factors, std::int64_t at) {
        return at / width * factors.signals_example + (at % width + plane) * factors.signals_output;
      };
      shared.signal_row[i] = i < rows ? begin(layer.left, row0 + i) : -1;
      shared.signal_column[i] = i < columns ? begin(layer.right, column0 + i) : -1;
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
    for (std::int64_t t = 0; t < layer.positions; ++t)
      for (std::int64_t s = 0; s < layer.positions; ++s) {
        const auto activations = [&](const GramFactors<T>& of, std::int64_t position,
                                     const std::int64_t* offsets) {
          const T* base = of.activations + position * of.activations_position;
          return Operand<T>{base, offsets, 0, at_sixteen_bytes(base, of.activations_example, 0)};
        };
        const auto signals = [&](const GramFactors<T>& of, std::int64_t position,
                                 const std::int64_t* offsets) {
          const T* base = of.signals + position * of.signals_position;
          return Operand<T>{base, offsets, of.signals_output,
                            at_sixteen_bytes(base, of.signals_example, of.signals_output)};
        };
        typename Core::template Sums<Edge> products{};
        multiply<Core, Edge>(activations(layer.left, t, shared.activation_row),
                             activations(layer.right, s, shared.activation_column), layer.inputs, 1,
                             shared, products);
        Core::template for_each<Edge>(products, [&](T& product, int i, int j) {
          shared.activations[i * Memory::pitch + j] = product + (layer.bias ? T(1) : T(0));
        });
        typename Core::template Sums<tile> sums{};
        multiply<Core, tile>(signals(layer.left, t, shared.signal_row),
                             signals(layer.right, s, shared.signal_column), layer.outputs,
                             arguments.summed, shared, sums);
        Core::template for_each_pair<tile>(total, sums, [&](T& to, T sum, int r, int c) {
          to += shared.activations[shared.row_example[r] + shared.column_example[c]] * sum;
        });
      }
  }

  // In strips through shared memory, from which neighbouring threads write neighbours: of the
  // mirror image too. A tile on the diagonal writes its upper half to both, so that the result is
  // exactly symmetric.
  constexpr int strip = 32, pitch = tile + 1;
  static_assert(strip * pitch <= 4 * Core::staged);
  T* strip_sums = shared.left[0];
  const bool diagonal = arguments.symmetric && blockIdx.x == blockIdx.y;
  const std::int64_t across = arguments.m * width, planes = arguments.planes;
  for (int begin = 0; begin < tile; begin += strip) {
    Core::template for_each<tile>(total, [&](T& value, int r, int c) {
      if (r >= begin && r < begin + strip) strip_sums[(r - begin) * pitch + c] = value;
    });
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < strip * tile; e += threads) {
      const int r = begin + e / tile, c = e % tile;
      if (r >= rows || c >= columns || (diagonal && r > c)) continue;
      T* to = arguments.out + ((row0 + r) * across + column0 + c) * planes + plane;
      T& sum = strip_sums[e / tile * pitch + c];
      if (arguments.accumulate) sum += *to;
      *to = sum;
    }
    __syncthreads();
    if (!arguments.symmetric) continue;
    for (int e = static_cast<int>(threadIdx.x); e < strip * tile; e += threads) {
      const int c = e / strip, r = begin + e % strip;
      if (r >= rows || c >= columns || (diagonal && r > c)) continue;
      arguments.out[((column0 + c) * across + row0 + r) * planes + plane] =
          strip_sums[e % strip * pitch + c];
    }
    __syncthreads();
  }
}

template <class Core, int Edge>
Status run(const Arguments<typename Core::Type>& arguments, dim3 grid, cuda::Queue queue) {
  static_assert(sizeof(Shared<Core, Edge>) <= 163 * 1024, "what a block has on sm_80");
  return launch(&gram_tile<Core, Edge>, grid, dim3(threads),
                static_cast<std::int64_t>(sizeof(Shared<Core, Edge>)), queue, arguments);
}

// Takes the kernel for as many examples as a tile has at most.
template <class Core>
Status run_width(const Arguments<typename Core::Type>& arguments, dim3 grid, cuda::Queue queue) {
  constexpr int tile = Core::tile;
  const std::int64_t examples =
      arguments.width > tile ? 2 : arguments.rows_in_tile / arguments.width;
  if (examples <= 16) return run<Core, 16>(arguments, grid, queue);
  if (examples <= 32) return run<Core, 32>(arguments, grid, queue);
  if constexpr (tile > 64)
    if (examples <= 64) return run<Core, 64>(arguments, grid, queue);
  return run<Core, tile>(arguments, grid, queue);
}

// On tensor cores: in TF32, or `split` into two TF32 numbers each, of whose products three count.
inline constexpr int tensor_tile = 128;
Status run_tensor(const Arguments<float>& arguments, bool split, dim3 grid, cuda::Queue queue);

}  // namespace jacpot::gram_tiles
