// Arithmetic on single vectors, in float64, and their way to and from a narrower type.
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

struct VectorTable {
  double (*dot)(std::int64_t size, const double* x, const double* y);
  // y = scale · y + alpha · x
  void (*combine)(std::int64_t size, double alpha, const double* x, double scale, double* y);
  Staging<float> single_precision;
  Staging<double> double_precision;
};

}  // namespace jacpot::krylov

namespace jacpot {
using VectorTable = krylov::VectorTable;
JACPOT_DISPATCH_TABLE(VectorTable)
}  // namespace jacpot
