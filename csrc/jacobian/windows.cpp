#include "jacobian/windows.hpp"

#include <algorithm>

#include "common/parallel.hpp"

namespace jacpot {

template <class T>
void windows(const T* x, std::int64_t n, std::int64_t size, const std::int64_t* places,
             std::int64_t t, const std::int64_t* offsets, std::int64_t i, T* out, int threads) {
  constexpr std::int64_t elements = 1 << 16;
  const std::int64_t each = std::max<std::int64_t>(1, elements / std::max<std::int64_t>(1, i));
  const std::int64_t parts = (t + each - 1) / each;
  parallel_for(threads, n * parts, [=](std::int64_t task) {
    const std::int64_t example = task / parts, first = task % parts * each;
    for (std::int64_t place = first; place < std::min(t, first + each); ++place) {
      const T* from = x + example * size + places[place];
      T* to = out + (example * t + place) * i;
      for (std::int64_t e = 0; e < i; ++e) to[e] = from[offsets[e]];
    }
  });
}

template void windows<float>(const float*, std::int64_t, std::int64_t, const std::int64_t*,
                             std::int64_t, const std::int64_t*, std::int64_t, float*, int);
template void windows<double>(const double*, std::int64_t, std::int64_t, const std::int64_t*,
                              std::int64_t, const std::int64_t*, std::int64_t, double*, int);

}  // namespace jacpot
