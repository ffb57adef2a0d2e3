// Matrices as small as the number of right-hand sides: row-major, float64, plain loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace jacpot::krylov {

struct SmallMatrix {
  std::int64_t rows = 0, columns = 0;
  std::vector<double> data;

  SmallMatrix() = default;
  SmallMatrix(std::int64_t m, std::int64_t n)
      : rows(m), columns(n), data(static_cast<std::size_t>(m * n), 0.0) {}
  double& operator()(std::int64_t i, std::int64_t j) {
    return data[static_cast<std::size_t>(i * columns + j)];
  }
  double operator()(std::int64_t i, std::int64_t j) const {
    return data[static_cast<std::size_t>(i * columns + j)];
  }
};

inline SmallMatrix operator*(const SmallMatrix& a, const SmallMatrix& b) {
  SmallMatrix c(a.rows, b.columns);
  for (std::int64_t i = 0; i < a.rows; ++i)
    for (std::int64_t k = 0; k < a.columns; ++k)
      for (std::int64_t j = 0; j < b.columns; ++j) c(i, j) += a(i, k) * b(k, j);
  return c;
}

// a = L·Lᵀ in place (lower half). False when a is not positive definite to rounding.
inline bool cholesky(SmallMatrix& a) {
  for (std::int64_t j = 0; j < a.rows; ++j) {
    const double before = a(j, j);
    for (std::int64_t k = 0; k < j; ++k) a(j, j) -= a(j, k) * a(j, k);
    if (!(a(j, j) > 1e-15 * before)) return false;
    a(j, j) = std::sqrt(a(j, j));
    for (std::int64_t i = j + 1; i < a.rows; ++i) {
      for (std::int64_t k = 0; k < j; ++k) a(i, j) -= a(i, k) * a(j, k);
      a(i, j) /= a(j, j);
    }
  }
  return true;
}

// b = (L·Lᵀ)⁻¹ b
inline void cholesky_solve(const SmallMatrix& l, SmallMatrix& b) {
  for (std::int64_t c = 0; c < b.columns; ++c) {
    for (std::int64_t i = 0; i < l.rows; ++i) {
      for (std::int64_t k = 0; k < i; ++k) b(i, c) -= l(i, k) * b(k, c);
      b(i, c) /= l(i, i);
    }
    for (std::int64_t i = l.rows; i-- > 0;) {
      for (std::int64_t k = i + 1; k < l.rows; ++k) b(i, c) -= l(k, i) * b(k, c);
      b(i, c) /= l(i, i);
    }
  }
}

// Orthonormalises columns that have the Gram matrix h: with T (s, k), TᵀHT = I, and the columns
// are (columns·T)·ζ, as far as they are independent; pivoting leaves out those that are not.
struct Orthonormal {
  SmallMatrix t, zeta;
};

inline Orthonormal orthonormalise(const SmallMatrix& h, double tolerance) {
  const std::int64_t s = h.rows;
  std::vector<double> left(static_cast<std::size_t>(s));
  std::vector<std::int64_t> pivots;
  SmallMatrix zeta(s, s);  // row i: coefficients of all columns along the i-th direction
  for (std::int64_t j = 0; j < s; ++j) left[static_cast<std::size_t>(j)] = h(j, j);
  while (static_cast<std::int64_t>(pivots.size()) < s) {
    std::int64_t best = -1;
    double share = tolerance;
    for (std::int64_t j = 0; j < s; ++j) {
      const double own = h(j, j) > 0 ? left[static_cast<std::size_t>(j)] / h(j, j) : 0;
      if (own > share) share = own, best = j;
    }
    if (best < 0) break;
    const auto i = static_cast<std::int64_t>(pivots.size());
    const double root = std::sqrt(left[static_cast<std::size_t>(best)]);
    for (std::int64_t j = 0; j < s; ++j) {
      double value = h(best, j);
      for (std::int64_t k = 0; k < i; ++k) value -= zeta(k, best) * zeta(k, j);
      zeta(i, j) = value / root;
      left[static_cast<std::size_t>(j)] -= zeta(i, j) * zeta(i, j);
    }
    left[static_cast<std::size_t>(best)] = 0;
    pivots.push_back(best);
  }
  const auto k = static_cast<std::int64_t>(pivots.size());
  Orthonormal out{SmallMatrix(s, k), SmallMatrix(k, s)};
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = 0; j < s; ++j) out.zeta(i, j) = zeta(i, j);
  // T solves ζ[:, pivots] X = I, upper triangular, and sits in the pivots' rows.
  for (std::int64_t c = 0; c < k; ++c)
    for (std::int64_t i = k; i-- > 0;) {
      double value = i == c ? 1.0 : 0.0;
      for (std::int64_t m = i + 1; m < k; ++m)
        value -= zeta(i, pivots[static_cast<std::size_t>(m)]) *
                 out.t(pivots[static_cast<std::size_t>(m)], c);
      out.t(pivots[static_cast<std::size_t>(i)], c) =
          value / zeta(i, pivots[static_cast<std::size_t>(i)]);
    }
  return out;
}

}  // namespace jacpot::krylov
