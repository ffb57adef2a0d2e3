#include "common/cuda_mma.cuh"
#include "jacobian/gram_tile.cuh"

namespace jacpot::gram_tiles {
namespace {

constexpr int depth_of_one = 8;  // products that an mma sums

// A number as TF32, or as the sum of two that have 22 bits of it together.
template <bool Split>
struct Parts {
  float big, small;

  __device__ __forceinline__ explicit Parts(float x) : big(to_tf32(x)), small(0) {
    if constexpr (Split) small = to_tf32(x - big);
  }
};

// Eight warps share a tile; where it has fewer fragments than that, the last ones rest.
template <int Edge>
struct Share {
  static constexpr int down = smaller(2, Edge / mma_rows), across = smaller(4, Edge / mma_columns);
  static constexpr int rows = Edge / mma_rows / down, columns = Edge / mma_columns / across;
  int lane, row, column;  // of the warp's first fragment
  bool active;

  __device__ __forceinline__ Share() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    row = warp / across * rows * mma_rows;
    column = warp % across * columns * mma_columns;
    active = warp < down * across;
  }
};

// Rows of a chunk lie one after the other. With four elements of padding, the eight rows and four
// columns that a fragment is loaded from lie in 32 different banks.
template <bool Split>
struct Tensor {
  using Type = float;
  static constexpr int tile = tensor_tile, pad = 4;
  template <int Edge>
  static constexpr int chunk = Edge == tile ? 32 : 16 * tile / Edge;
  template <int Edge>
  static constexpr int pitch = chunk<Edge> + pad;
  static constexpr int staged = tile * pitch<tile>;
  static constexpr bool rows_contiguous = true;

  template <int Edge>
  struct Sums {
    float value[Share<Edge>::rows][Share<Edge>::columns][4];
  };

  template <int Edge>
  static __device__ __forceinline__ int place(int row, int d) {
    return row * pitch<Edge> + d;
  }

  template <int Edge, class F>
  static __device__ __forceinline__ void for_each_pair(Sums<Edge>& first, const Sums<Edge>& second,
                                                       F&& f) {
    const Share<Edge> share;
    if (!share.active) return;
#pragma unroll
    for (int m = 0; m < share.rows; ++m)
#pragma unroll
      for (int n = 0; n < share.columns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(first.value[m][n][i], second.value[m][n][i],
            share.row + m * mma_rows + mma_row(share.lane, i),
            share.column + n * mma_columns + mma_column(share.lane, i));
  }
  template <int Edge, class F>
  static __device__ __forceinline__ void for_each(Sums<Edge>& sums, F&& f) {
    for_each_pair<Edge>(sums, sums, [&](float& value, float, int r, int c) { f(value, r, c); });
  }

  template <int Edge>
  static __device__ __forceinline__ void multiply(const float* left, const float* right, int depth,
                                                  Sums<Edge>& sums) {
    using Number = Parts<Split>;
    static_assert(Edge * pitch<Edge> <= staged);
    const Share<Edge> share;
    if (!share.active) return;
    const int g = share.lane / 4, t = share.lane % 4;
    const float* rows = left + (share.row + g) * pitch<Edge> + t;
    const float* columns = right + (share.column + g) * pitch<Edge> + t;
#pragma unroll 1
    for (int k = 0; k < depth; k += depth_of_one) {
      float big[share.columns][2], small[share.columns][2];
#pragma unroll
      for (int n = 0; n < share.columns; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Number x(columns[n * mma_columns * pitch<Edge> + k + i * 4]);
          big[n][i] = x.big;
          small[n][i] = x.small;
        }
#pragma unroll
      for (int m = 0; m < share.rows; ++m) {
        float big_row[4], small_row[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Number x(rows[(m * mma_rows + i % 2 * 8) * pitch<Edge> + k + i / 2 * 4]);
          big_row[i] = x.big;
          small_row[i] = x.small;
        }
#pragma unroll
        for (int n = 0; n < share.columns; ++n) {
          if constexpr (Split) {  // small terms first: they round the least
            mma_tf32(sums.value[m][n], small_row, big[n]);
            mma_tf32(sums.value[m][n], big_row, small[n]);
          }
          mma_tf32(sums.value[m][n], big_row, big[n]);
        }
      }
    }
  }
};

}  // namespace

Status run_tensor(const Arguments<float>& arguments, bool split, dim3 grid, cuda::Queue queue) {
  return split ? run_width<Tensor<true>>(arguments, grid, queue)
               : run_width<Tensor<false>>(arguments, grid, queue);
}

}  // namespace jacpot::gram_tiles
