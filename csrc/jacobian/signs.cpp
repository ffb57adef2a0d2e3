#include "jacobian/signs.hpp"

#include <algorithm>

#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace jacpot {
namespace {

// The finaliser of SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number
// generators, 2014).
std::uint64_t mix(std::uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace

template <class T>
void signs(std::uint64_t seed, std::int64_t offset, std::int64_t count, std::int64_t first,
           std::int64_t last, T* out, int threads) {
  constexpr std::int64_t tile = 1024;
  parallel_for(threads, (count + tile - 1) / tile, [&](std::int64_t task) {
    const std::int64_t begin = task * tile, end = std::min(count, begin + tile);
    std::uint64_t bits[tile] = {};
    for (std::int64_t d = first; d < last; ++d) {
      if (d == first || d % 64 == 0)  // one hash is worth 64 columns
        for (std::int64_t p = begin; p < end; ++p)
          bits[p - begin] = mix(mix(seed + static_cast<std::uint64_t>(offset + p)) +
                                static_cast<std::uint64_t>(d / 64));
      T* row = out + (d - first) * count;
      for (std::int64_t p = begin; p < end; ++p)
        row[p] = T(1) - T(2) * static_cast<T>((bits[p - begin] >> (d % 64)) & 1);
    }
  });
}

template <class T>
Status add_sparse_sketch(const T* rows, std::int64_t m, std::int64_t count, std::uint64_t seed,
                         std::int64_t offset, std::int64_t nonzeros, std::int64_t dim, T* out,
                         int threads) {
  // Column of each entry, twice, plus one where the sign is negative: drawn once for all rows.
  const Scratch<std::int64_t> entries = allocate_scratch<std::int64_t>(count * nonzeros);
  if (!entries) return {Code::out_of_memory, "not enough memory for the sketch"};
  constexpr std::int64_t tile = 1024;
  parallel_for(threads, (count + tile - 1) / tile, [&](std::int64_t task) {
    for (std::int64_t p = task * tile; p < std::min(count, (task + 1) * tile); ++p) {
      const std::uint64_t own = mix(seed + static_cast<std::uint64_t>(offset + p));
      for (std::int64_t c = 0; c < nonzeros; ++c) {
        const std::uint64_t bits = mix(own + static_cast<std::uint64_t>(c));
        const std::int64_t begin = dim * c / nonzeros, end = dim * (c + 1) / nonzeros;
        const auto inside = static_cast<std::int64_t>(
            ((bits >> 32) * static_cast<std::uint64_t>(end - begin)) >> 32);
        entries[p * nonzeros + c] = 2 * (begin + inside) + static_cast<std::int64_t>(bits & 1);
      }
    }
  });
  parallel_for(threads, m, [&](std::int64_t row) {
    T* to = out + row * dim;
    for (std::int64_t p = 0; p < count; ++p) {
      const T signed_values[2] = {rows[row * count + p], -rows[row * count + p]};
      for (std::int64_t c = 0; c < nonzeros; ++c) {
        const std::int64_t entry = entries[p * nonzeros + c];
        to[entry / 2] += signed_values[entry % 2];
      }
    }
  });
  return {};
}

template Status add_sparse_sketch<float>(const float*, std::int64_t, std::int64_t, std::uint64_t,
                                         std::int64_t, std::int64_t, std::int64_t, float*, int);
template Status add_sparse_sketch<double>(const double*, std::int64_t, std::int64_t, std::uint64_t,
                                          std::int64_t, std::int64_t, std::int64_t, double*, int);
template void signs<float>(std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                           float*, int);
template void signs<double>(std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                            double*, int);

}  // namespace jacpot
