// Products of a row-major matrix with one vector, which take as long as reading the matrix does.
// T is the matrix's type, S that of the vectors and of the arithmetic.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot::krylov {

template <class T, class S>
struct RowKernels {
  // y (rows) += A x
  void (*add)(const T* a, std::int64_t stride, std::int64_t rows, std::int64_t columns, const S* x,
              S* y);
  // y (columns) += Aᵀ u. Meanwhile as many rows from `next` on are called into the cache: where
  // A has just been read for the other product, memory would idle.
  void (*add_transposed)(const T* a, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                         const S* u, S* y, const T* next);
};

struct RowTable {
  static constexpr std::int64_t block = 8;  // rows that the kernels take at a time

  RowKernels<float, float> single_precision;
  RowKernels<double, double> double_precision;
  RowKernels<float, double> widened;
};

}  // namespace jacpot::krylov

namespace jacpot {
using RowTable = krylov::RowTable;
JACPOT_DISPATCH_TABLE(RowTable)
}  // namespace jacpot
