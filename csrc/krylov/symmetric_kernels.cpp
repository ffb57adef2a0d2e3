#include "common/shuffle.hpp"
#include "common/simd.hpp"
#include "krylov/symmetric.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

// Four rows at once: each loaded vector of A feeds two FMAs, one along its row and one for the
// mirror image; x and y are loaded once for the four.
constexpr int rows = 4;

template <class T>
void multiply(const T* a, std::int64_t stride, std::int64_t size, std::int64_t begin,
              std::int64_t end, const T* x, T* y) {
  using V = Simd<T>;
  std::int64_t i = begin;
  for (; i + rows <= end; i += rows) {
    // The 4 x 4 corner on the diagonal.
    for (int r = 0; r < rows; ++r) {
      const T* row = a + (i + r) * stride;
      y[i + r] += row[i + r] * x[i + r];
      for (int c = r + 1; c < rows; ++c) {
        y[i + r] += row[i + c] * x[i + c];
        y[i + c] += row[i + c] * x[i + r];
      }
    }
    typename V::Vec sum[rows], factor[rows];
    const T* row[rows];
    for (int r = 0; r < rows; ++r) {
      sum[r] = V::zero();
      factor[r] = V::broadcast(x[i + r]);
      row[r] = a + (i + r) * stride;
    }
    std::int64_t j = i + rows;
    for (; j + V::width <= size; j += V::width) {
      const auto xj = V::load(x + j);
      auto yj = V::load(y + j);
      for (int r = 0; r < rows; ++r) {
        const auto v = V::load(row[r] + j);
        sum[r] = V::fma(v, xj, sum[r]);
        yj = V::fma(v, factor[r], yj);
      }
      V::store(y + j, yj);
    }
    for (; j < size; ++j)
      for (int r = 0; r < rows; ++r) {
        y[i + r] += row[r][j] * x[j];
        y[j] += row[r][j] * x[i + r];
      }
    for (int r = 0; r < rows; ++r) y[i + r] += V::sum(sum[r]);
  }
  for (; i < end; ++i) {
    const T* row = a + i * stride;
    y[i] += row[i] * x[i];
    for (std::int64_t j = i + 1; j < size; ++j) {
      y[i] += row[j] * x[j];
      y[j] += row[j] * x[i];
    }
  }
}

// A band of rows: what lies above the diagonal in blocks of a vector of columns, zeros in its
// place below, and the diagonal at the end.
constexpr int band = 8;

template <class T>
constexpr std::int64_t block = Simd<T>::width > band ? Simd<T>::width : band;

template <class T>
std::int64_t band_size(std::int64_t row, std::int64_t size) {
  return (size - row / block<T> * block<T>)*band + block<T>;
}

template <class T>
void pack_band(const T* a, std::int64_t stride, std::int64_t actual, std::int64_t row,
               std::int64_t size, T* to) {
  using V = Simd<T>;
  for (std::int64_t j = row / block<T> * block<T>; j < size; j += V::width) {
    const bool inside = j >= row + band && j + V::width <= actual;
    for (std::int64_t i = row; i < row + band; ++i, to += V::width) {
      if (inside) {
        V::store(to, V::load(a + i * stride + j));
        continue;
      }
      for (std::int64_t c = 0; c < V::width; ++c)
        to[c] = i < actual && j + c < actual && j + c > i ? a[i * stride + j + c] : T(0);
    }
  }
  for (std::int64_t i = row; i < row + band; ++i) *to++ = i < actual ? a[i * stride + i] : T(0);
}

template <class T>
void multiply_band(const T* from, std::int64_t row, std::int64_t size, const T* x, T* y) {
  using V = Simd<T>;
  using S = Shuffle<T>;
  typename V::Vec sum[band], factor[band];
  for (int r = 0; r < band; ++r) {
    sum[r] = V::zero();
    factor[r] = V::broadcast(x[row + r]);
  }
  for (std::int64_t j = row / block<T> * block<T>; j < size; j += V::width) {
    const auto xj = V::load(x + j);
    // Two chains hide the latency of the additions.
    auto even = V::load(y + j), odd = V::zero();
#pragma GCC unroll 8
    for (int r = 0; r < band; r += 2) {
      auto v = V::load(from + r * V::width), w = V::load(from + (r + 1) * V::width);
      S::keep(v);
      S::keep(w);
      sum[r] = V::fma(v, xj, sum[r]);
      sum[r + 1] = V::fma(w, xj, sum[r + 1]);
      even = V::fma(v, factor[r], even);
      odd = V::fma(w, factor[r + 1], odd);
    }
    V::store(y + j, even + odd);
    from += band * V::width;
  }
  for (int r = 0; r < band; ++r) y[row + r] += from[r] * x[row + r];
#pragma GCC unroll 4
  for (int r = 0; r < band; r += S::lane) {
    typename V::Vec some[S::lane];
#pragma GCC unroll 4
    for (int k = 0; k < S::lane; ++k) some[k] = sum[r + k];
    S::add_sums(some, y + row + r);
  }
}

template <class T>
constexpr krylov::SymmetricKernels<T> table_of() {
  return {&multiply<T>, band, block<T>, &band_size<T>, &pack_band<T>, &multiply_band<T>};
}

constexpr SymmetricTable kernels{table_of<float>(), table_of<double>()};

}  // namespace

const SymmetricTable& table(const SymmetricTable*) { return kernels; }

}  // namespace jacpot::JACPOT_ISA
