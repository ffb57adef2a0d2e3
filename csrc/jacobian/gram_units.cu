// A block owns a tile of the output. A chunk of units is staged at a time: the signals of the
// tile's rows and columns, and the products of the activations of its examples, while the chunk
// before is multiplied. Sums stay in registers.

#include "common/cuda_device.cuh"
#include "jacobian/gram_cuda.hpp"

namespace jacpot {
namespace {

using namespace cuda;

constexpr int side = 16, threads = side * side;

template <class T>
constexpr int tile = sizeof(T) == 4 ? 128 : 64;
template <class T>
constexpr int own = tile<T> / side;  // rows, and columns, of a thread: neighbours
// Units of a chunk, so that the activations' products of `Edge` x `Edge` examples fit.
template <int Edge>
constexpr int chunk = Edge == 16   ? 16
                      : Edge == 32 ? 8
                                   : 2;

template <class T, int Edge>
struct Chunk {
  static constexpr int pitch = tile<T> + Pack<T>::size;
  T left[chunk<Edge> * pitch], right[chunk<Edge> * pitch];
  T products[chunk<Edge> * Edge * Edge];
};

template <class T, int Edge>
struct Shared {
  Chunk<T, Edge> buffer[2];
};

template <class T>
struct Arguments {
  CudaGramUnits<T> units;
  bool symmetric;
  std::int64_t n, m, k;
  std::int64_t rows_in_tile;  // whole examples where they fit
  T* out;
};

template <class T, int Edge>
__device__ __forceinline__ void stage(const Arguments<T>& a, std::int64_t first, std::int64_t row0,
                                      std::int64_t column0, int rows, int columns,
                                      Chunk<T, Edge>& to) {
  constexpr int units = chunk<Edge>;
  const CudaGramUnits<T>& u = a.units;
  const auto copy = [&](T* shared, const T* from, bool there) {
    copy_async<sizeof(T)>(shared, there ? from : u.products,
                          there ? static_cast<int>(sizeof(T)) : 0);
  };
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < 2 * tile<T> * units; e += threads) {
    const int unit = e % units, at = e / units % tile<T>;
    const bool of_left = e < tile<T> * units;
    const auto& side_of = of_left ? u.left : u.right;
    const std::int64_t row = (of_left ? row0 : column0) + at;
    copy((of_left ? to.left : to.right) + unit * Chunk<T, Edge>::pitch + at,
         side_of.signals + row / a.k * side_of.example + row % a.k * side_of.output + first + unit,
         at < (of_left ? rows : columns) && first + unit < u.count);
  }
  const std::int64_t n0 = row0 / a.k, m0 = column0 / a.k;
  for (int e = thread; e < Edge * Edge * units; e += threads) {
    const int j = e % Edge, i = e / Edge % Edge, unit = e / (Edge * Edge);
    copy(to.products + e, u.products + ((first + unit) * a.n + n0 + i) * a.m + m0 + j,
         n0 + i < a.n && m0 + j < a.m && first + unit < u.count);
  }
  copies_commit();
}

template <class T, int Edge>
__global__ __launch_bounds__(threads) void add_units(const __grid_constant__ Arguments<T> a) {
  if (a.symmetric && blockIdx.x < blockIdx.y) return;  // a mirror image
  auto& shared = *shared_memory<Shared<T, Edge>>();
  const std::int64_t row0 = blockIdx.y * a.rows_in_tile, column0 = blockIdx.x * a.rows_in_tile;
  const int rows = static_cast<int>(smaller(a.rows_in_tile, a.n * a.k - row0));
  const int columns = static_cast<int>(smaller(a.rows_in_tile, a.m * a.k - column0));
  const int y = static_cast<int>(threadIdx.x) / side * own<T>;
  const int x = static_cast<int>(threadIdx.x) % side * own<T>;
  int at_row[own<T>], at_column[own<T>];  // of each row and column, in the products
#pragma unroll
  for (int i = 0; i < own<T>; ++i) {
    at_row[i] = static_cast<int>((row0 + smaller(y + i, rows - 1)) / a.k - row0 / a.k) * Edge;
    at_column[i] = static_cast<int>((column0 + smaller(x + i, columns - 1)) / a.k - column0 / a.k);
  }
  T sums[own<T>][own<T>]{};
  stage(a, 0, row0, column0, rows, columns, shared.buffer[0]);
  int now = 0;
  for (std::int64_t first = 0; first < a.units.count; first += chunk<Edge>, now ^= 1) {
    copies_wait<0>();
    __syncthreads();  // this chunk is there, and nobody reads the one before any more
    if (first + chunk<Edge> < a.units.count)
      stage(a, first + chunk<Edge>, row0, column0, rows, columns, shared.buffer[now ^ 1]);
    const Chunk<T, Edge>& at = shared.buffer[now];
#pragma unroll 1
    for (int unit = 0; unit < chunk<Edge>; ++unit) {
      const T* products = at.products + unit * Edge * Edge;
      T left[own<T>], right[own<T>];
#pragma unroll
      for (int i = 0; i < own<T>; ++i) {
        left[i] = at.left[unit * Chunk<T, Edge>::pitch + y + i];
        right[i] = at.right[unit * Chunk<T, Edge>::pitch + x + i];
      }
#pragma unroll
      for (int i = 0; i < own<T>; ++i)
#pragma unroll
        for (int j = 0; j < own<T>; ++j)
          sums[i][j] += products[at_row[i] + at_column[j]] * (left[i] * right[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < own<T>; ++i)
#pragma unroll
    for (int j = 0; j < own<T>; ++j)
      if (y + i < rows && x + j < columns)
        a.out[(row0 + y + i) * a.m * a.k + column0 + x + j] += sums[i][j];
}

template <class T, int Edge>
Status run(const Arguments<T>& arguments, dim3 grid, cuda::Queue queue) {
  static_assert(sizeof(Shared<T, Edge>) <= 163 * 1024, "what a block has on sm_80");
  return launch(&add_units<T, Edge>, grid, dim3(threads),
                static_cast<std::int64_t>(sizeof(Shared<T, Edge>)), queue, arguments);
}

}  // namespace

template <class T>
Status cuda_add_units(const CudaGramUnits<T>& units, bool symmetric, std::int64_t n, std::int64_t m,
                      std::int64_t k, T* out, cuda::Queue queue) {
  if (n == 0 || m == 0 || units.count == 0) return {};
  if (k < 2) return {Code::invalid_argument, "there must be at least two outputs"};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  const std::int64_t rows_in_tile = k > tile<T> ? tile<T> : tile<T> / k * k;
  const std::int64_t examples = k > tile<T> ? 2 : rows_in_tile / k;
  const std::int64_t down = divide_up(n * k, rows_in_tile), across = divide_up(m * k, rows_in_tile);
  if (down > 65535 || across > INT32_MAX)
    return {Code::overflow, "the kernel is too large for one launch: give fewer examples at once"};
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  const Arguments<T> arguments{units, symmetric, n, m, k, rows_in_tile, out};
  if (examples <= 16) return run<T, 16>(arguments, grid, queue);
  if constexpr (tile<T> / 2 > 32)
    if (examples > 32) return run<T, 64>(arguments, grid, queue);
  return run<T, 32>(arguments, grid, queue);
}

template Status cuda_add_units<float>(const CudaGramUnits<float>&, bool, std::int64_t, std::int64_t,
                                      std::int64_t, float*, cuda::Queue);
template Status cuda_add_units<double>(const CudaGramUnits<double>&, bool, std::int64_t,
                                       std::int64_t, std::int64_t, double*, cuda::Queue);

}  // namespace jacpot
