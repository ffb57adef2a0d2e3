// y = A x for a symmetric matrix of which only the part on and above the diagonal is read: half
// the memory traffic, which is what such a product costs. A matrix that caches hold is packed
// first: bands of rows one after another, so that a product reads one aligned stream.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot::krylov {

template <class T>
struct SymmetricKernels {
  // y (size) += the contribution of rows [begin, end) and of their mirror images.
  void (*multiply)(const T* a, std::int64_t stride, std::int64_t size, std::int64_t begin,
                   std::int64_t end, const T* x, T* y);

  // Packed: rows in bands of `band_rows`, columns in blocks of `block`, sizes rounded up to both.
  std::int64_t band_rows, block;
  // Elements of the band that begins at `row`, of a matrix of the rounded size.
  std::int64_t (*band_size)(std::int64_t row, std::int64_t size);
  void (*pack_band)(const T* a, std::int64_t stride, std::int64_t actual, std::int64_t row,
                    std::int64_t size, T* band);
  // y (size) += the contribution of a band and of its mirror image; x and y aligned to vectors.
  void (*multiply_band)(const T* band, std::int64_t row, std::int64_t size, const T* x, T* y);
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
