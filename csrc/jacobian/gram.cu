#include "jacobian/gram_tile.cuh"

namespace jacpot {
namespace gram_tiles {
namespace {

constexpr int side = 16;  // threads along each edge of a block

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

// Ordinary multiply-adds. Registers hold a tile of the result and one of the signals' products:
// 128 x 128 float32, or 64 x 64 float64. A chunk lies with its rows innermost.
template <class T>
struct Plain {
  using Type = T;
  static constexpr int tile = sizeof(T) == 4 ? 128 : 64;
  template <int Edge>
  static constexpr int chunk = Edge == tile ? 16 : 8 * tile / Edge;
  static constexpr int pad = Pack<T>::size;  // keeps 16-byte accesses aligned, moves the banks
  static constexpr int staged = 16 * (tile + pad);
  static constexpr bool rows_contiguous = false;

  template <int Edge>
  struct Sums {
    T value[Edge / side][Edge / side];
  };

  template <int Edge>
  static __device__ __forceinline__ int place(int row, int d) {
    return d * (Edge + pad) + row;
  }

  template <int Edge, class F>
  static __device__ __forceinline__ void for_each_pair(Sums<Edge>& first, const Sums<Edge>& second,
                                                       F&& f) {
    constexpr int own = Edge / side;
    const int y = static_cast<int>(threadIdx.x) / side, x = static_cast<int>(threadIdx.x) % side;
#pragma unroll
    for (int i = 0; i < own; ++i)
#pragma unroll
      for (int j = 0; j < own; ++j)
        f(first.value[i][j], second.value[i][j], position<own>(y, i), position<own>(x, j));
  }
  template <int Edge, class F>
  static __device__ __forceinline__ void for_each(Sums<Edge>& sums, F&& f) {
    for_each_pair<Edge>(sums, sums, [&](T& value, T, int r, int c) { f(value, r, c); });
  }

  template <int Edge>
  static __device__ __forceinline__ void multiply(const T* left, const T* right, int depth,
                                                  Sums<Edge>& sums) {
    constexpr int own = Edge / side;
    static_assert(chunk<Edge> * (Edge + pad) <= staged);
    const int y = static_cast<int>(threadIdx.x) / side, x = static_cast<int>(threadIdx.x) % side;
    const auto step = [&](int inner) {
      T a[own], b[own];
      load_own<T, own>(left + place<Edge>(0, inner), y, a);
      load_own<T, own>(right + place<Edge>(0, inner), x, b);
#pragma unroll
      for (int i = 0; i < own; ++i)
#pragma unroll
        for (int j = 0; j < own; ++j) sums.value[i][j] += a[i] * b[j];
    };
    if (depth == chunk<Edge>) {
#pragma unroll
      for (int inner = 0; inner < chunk<Edge>; ++inner) step(inner);
    } else {
#pragma unroll 1
      for (int inner = 0; inner < depth; ++inner) step(inner);
    }
  }
};

}  // namespace
}  // namespace gram_tiles

template <class T>
Status cuda_gram(const std::vector<GramLayer<T>>& layers, bool symmetric, std::int64_t n,
                 std::int64_t m, std::int64_t k, GramOutputs outputs, CudaGramPrecision precision,
                 T* out, cuda::Queue queue) {
  using namespace gram_tiles;
  if (n == 0 || m == 0 || k == 0) return {};
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  constexpr std::int64_t tile = Plain<T>::tile;
  static_assert(sizeof(T) == 8 || tile == tensor_tile);
  Arguments<T> arguments{};
  arguments.symmetric = symmetric;
  arguments.n = n;
  arguments.m = m;
  arguments.width = outputs == GramOutputs::full ? k : 1;
  arguments.summed = outputs == GramOutputs::trace ? k : 1;
  arguments.planes = outputs == GramOutputs::diagonal ? k : 1;
  arguments.out = out;
  const std::int64_t width = arguments.width;
  arguments.rows_in_tile = width > tile ? tile : tile / width * width;
  const std::int64_t grid_rows = divide_up(n * width, arguments.rows_in_tile);
  const std::int64_t grid_columns = divide_up(m * width, arguments.rows_in_tile);
  if (grid_rows > 65535 || arguments.planes > 65535 || grid_columns > INT32_MAX)
    return {Code::overflow, "the kernel is too large for one launch: give fewer examples at once"};
  const dim3 grid(static_cast<unsigned>(grid_columns), static_cast<unsigned>(grid_rows),
                  static_cast<unsigned>(arguments.planes));
  const auto launch_tiles = [&] {
    if constexpr (sizeof(T) == 4)
      if (precision != CudaGramPrecision::exact)
        return run_tensor(arguments, precision == CudaGramPrecision::tf32x3, grid, queue);
    return run_width<Plain<T>>(arguments, grid, queue);
  };
  std::size_t done = 0;
  do {  // once even without layers: the sum of nothing is zero
    arguments.accumulate = done > 0;
    arguments.n_layers = 0;
    while (done < layers.size() && arguments.n_layers < max_layers)
      arguments.layers[arguments.n_layers++] = layers[done++];
    if (const Status status = launch_tiles(); !status.ok()) return status;
  } while (done < layers.size());
  return {};
}

template Status cuda_gram<float>(const std::vector<GramLayer<float>>&, bool, std::int64_t,
                                 std::int64_t, std::int64_t, GramOutputs, CudaGramPrecision, float*,
                                 cuda::Queue);
template Status cuda_gram<double>(const std::vector<GramLayer<double>>&, bool, std::int64_t,
                                  std::int64_t, std::int64_t, GramOutputs, CudaGramPrecision,
                                  double*, cuda::Queue);

}  // namespace jacpot
