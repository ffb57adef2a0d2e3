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

constexpr SymmetricTable kernels{{&multiply<float>}, {&multiply<double>}};

}  // namespace

const SymmetricTable& table(const SymmetricTable*) { return kernels; }

}  // namespace jacpot::JACPOT_ISA
