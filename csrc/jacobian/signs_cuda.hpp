// The signs of signs.hpp, bit for bit, on a GPU; and the mirror image of a symmetric matrix.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"

namespace jacpot {

// out[d - first, p - offset] = ±1 for parameters [offset, offset + count), columns [first, last).
template <class T>
Status cuda_signs(std::uint64_t seed, std::int64_t offset, std::int64_t count, std::int64_t first,
                  std::int64_t last, T* out, cuda::Queue queue);

// Copies the upper triangle of a (n, n) to the lower.
template <class T>
Status cuda_mirror(std::int64_t n, T* a, cuda::Queue queue);

}  // namespace jacpot
