#include "jacobian/signs.hpp"

#include <algorithm>

#include "common/parallel.hpp"

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

template void signs<float>(std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                           float*, int);
template void signs<double>(std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                            double*, int);

}  // namespace jacpot
