#include "krylov/row_kernels.hpp"

#include <type_traits>

#include "common/shuffle.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

// Elements of the matrix as a vector of S: all of one, or the first n and zeros.
template <class S, bool whole>
JACPOT_INLINE typename Simd<S>::Vec elements(const S* p, std::int64_t n) {
  return whole ? Simd<S>::load(p) : Simd<S>::load_first(p, n);
}
template <class S, bool whole>
  requires std::is_same_v<S, double>
JACPOT_INLINE typename Simd<S>::Vec elements(const float* p, std::int64_t n) {
  typedef float Narrow __attribute__((vector_size(JACPOT_VECTOR_BYTES / 2), aligned(4), may_alias));
  if constexpr (whole) {
    return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), typename Simd<S>::Vec);
  } else {
    float first[Simd<S>::width] = {};
    for (std::int64_t i = 0; i < n; ++i) first[i] = p[i];
    return elements<S, true>(first, n);
  }
}

template <int rows, class T, class S>
JACPOT_INLINE void add_rows(const T* a, std::int64_t stride, std::int64_t columns, const S* x,
                            S* y) {
  using V = Simd<S>;
  typename V::Vec sum[rows];
  for (auto& s : sum) s = V::zero();
  const auto step = [&]<bool whole>(std::int64_t j) __attribute__((always_inline)) {
    const auto xj = elements<S, whole>(x + j, columns - j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
      sum[r] = V::fma(elements<S, whole>(a + r * stride + j, columns - j), xj, sum[r]);
  };
  std::int64_t j = 0;
  for (; j + V::width <= columns; j += V::width) step.template operator()<true>(j);
  if (j < columns) step.template operator()<false>(j);
  for (int r = 0; r < rows; ++r) y[r] += Shuffle<S>::sum(sum[r]);
}

template <int rows, class T, class S>
JACPOT_INLINE void add_rows_transposed(const T* a, std::int64_t stride, std::int64_t columns,
                                       const S* u, S* y, const T* next) {
  using V = Simd<S>;
  typename V::Vec factor[rows];
  for (int r = 0; r < rows; ++r) factor[r] = V::broadcast(u[r]);
  const auto step = [&]<bool whole>(std::int64_t j) __attribute__((always_inline)) {
    // Two chains hide the latency of the additions.
    typename V::Vec sum[2] = {elements<S, whole>(y + j, columns - j), V::zero()};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      if constexpr (whole) __builtin_prefetch(next + r * stride + j, 0, 2);
      sum[r % 2] =
          V::fma(elements<S, whole>(a + r * stride + j, columns - j), factor[r], sum[r % 2]);
    }
    if constexpr (whole)
      V::store(y + j, sum[0] + sum[1]);
    else
      V::store_first(y + j, sum[0] + sum[1], columns - j);
  };
  std::int64_t j = 0;
  for (; j + V::width <= columns; j += V::width) step.template operator()<true>(j);
  if (j < columns) step.template operator()<false>(j);
}

constexpr int block = static_cast<int>(RowTable::block);

template <class T, class S>
void add(const T* a, std::int64_t stride, std::int64_t rows, std::int64_t columns, const S* x,
         S* y) {
  std::int64_t i = 0;
  for (; i + block <= rows; i += block) add_rows<block>(a + i * stride, stride, columns, x, y + i);
  for (; i < rows; ++i) add_rows<1>(a + i * stride, stride, columns, x, y + i);
}

template <class T, class S>
void add_transposed(const T* a, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                    const S* u, S* y, const T* next) {
  std::int64_t i = 0;
  for (; i + block <= rows; i += block)
    add_rows_transposed<block>(a + i * stride, stride, columns, u + i, y, next + i * stride);
  for (; i < rows; ++i)
    add_rows_transposed<1>(a + i * stride, stride, columns, u + i, y, next + i * stride);
}

template <class T, class S>
constexpr krylov::RowKernels<T, S> kernels_of() {
  return {&add<T, S>, &add_transposed<T, S>};
}

constexpr RowTable kernels{kernels_of<float, float>(), kernels_of<double, double>(),
                           kernels_of<float, double>()};

}  // namespace

const RowTable& table(const RowTable*) { return kernels; }

}  // namespace jacpot::JACPOT_ISA
