// Arithmetic on single vectors, in float64.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot::krylov {

struct VectorTable {
  double (*dot)(std::int64_t size, const double* x, const double* y);
  double (*widened_dot)(std::int64_t size, const float* x, const double* y);
  // y = scale · y + alpha · x
  void (*combine)(std::int64_t size, double alpha, const double* x, double scale, double* y);
};

}  // namespace jacpot::krylov

namespace jacpot {
using VectorTable = krylov::VectorTable;
JACPOT_DISPATCH_TABLE(VectorTable)
}  // namespace jacpot
