// Arithmetic of the solvers on blocks of vectors (rows, count), row-major and float64, and the way
// of single vectors to and from a narrower type.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot::krylov {

template <class S>
struct Staging {
  // to = factor · from
  void (*load)(std::int64_t size, double factor, const double* from, S* to);
  // to = Σ of the `count` vectors that lie `stride` apart
  void (*add_up)(std::int64_t size, std::int64_t count, const S* from, std::int64_t stride,
                 double* to);
};

// Coefficients and sums are one for each column.
struct VectorTable {
  // sums += x·y
  void (*dot)(std::int64_t rows, std::int64_t count, const double* x, const double* y,
              double* sums);
  // y = scale · y + alpha · x
  void (*combine)(std::int64_t rows, std::int64_t count, const double* alpha, const double* x,
                  const double* scale, double* y);
  // What conjugate gradients ask of q = A p:
  // q += damping · p; sums (4, count) += p·q, p·p, q·q, p·r
  void (*curvature)(std::int64_t rows, std::int64_t count, double damping, const double* p,
                    const double* r, double* q, double* sums);
  // and their step: x += alpha · p, r -= alpha · q; sums += r·r
  void (*advance)(std::int64_t rows, std::int64_t count, const double* alpha, const double* p,
                  const double* q, double* x, double* r, double* sums);
  Staging<float> single_precision;
  Staging<double> double_precision;
};

}  // namespace jacpot::krylov

namespace jacpot {
using VectorTable = krylov::VectorTable;
JACPOT_DISPATCH_TABLE(VectorTable)
}  // namespace jacpot
