// y = A x for a symmetric matrix of which only the part on and above the diagonal is read: half
// the memory traffic, which is what such a product costs.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot::krylov {

template <class T>
struct SymmetricKernels {
  // y (size) += the contribution of rows [begin, end) and of their mirror images.
  void (*multiply)(const T* a, std::int64_t stride, std::int64_t size, std::int64_t begin,
                   std::int64_t end, const T* x, T* y);
};

struct SymmetricTable {
  SymmetricKernels<float> single_precision;
  SymmetricKernels<double> double_precision;
};

}  // namespace jacpot::krylov

namespace jacpot {
using SymmetricTable = krylov::SymmetricTable;
JACPOT_DISPATCH_TABLE(SymmetricTable)
}  // namespace jacpot
