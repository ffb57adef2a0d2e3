// Signs from a counter: entry (p, d) depends on the seed, p and d alone, so that a random matrix
// needs no memory and does not change with the order or the batches in which it is used.
#pragma once

#include <cstdint>

namespace jacpot {

// out[d - first, p - offset] = ±1 for parameters [offset, offset + count) and columns [first,
// last).
template <class T>
void signs(std::uint64_t seed, std::int64_t offset, std::int64_t count, std::int64_t first,
           std::int64_t last, T* out, int threads);

}  // namespace jacpot
