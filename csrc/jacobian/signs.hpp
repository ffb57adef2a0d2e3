// Signs from a counter: entry (p, d) depends on the seed, p and d alone, so that a random matrix
// needs no memory and does not change with the order or the batches in which it is used.
#pragma once

#include <cstdint>

#include "common/status.hpp"

namespace jacpot {

// out[d - first, p - offset] = ±1 for parameters [offset, offset + count) and columns [first,
// last).
template <class T>
void signs(std::uint64_t seed, std::int64_t offset, std::int64_t count, std::int64_t first,
           std::int64_t last, T* out, int threads);

// out (m, dim) += rows (m, count) · S for parameters [offset, offset + count), where every row of S
// has `nonzeros` entries ±1, one in each of as many equal parts of the columns (Kane and Nelson,
// Sparser Johnson-Lindenstrauss transforms, 2014).
template <class T>
Status add_sparse_sketch(const T* rows, std::int64_t m, std::int64_t count, std::uint64_t seed,
                         std::int64_t offset, std::int64_t nonzeros, std::int64_t dim, T* out,
                         int threads);

}  // namespace jacpot
