#include "max_pool/max_pool.hpp"

#include <algorithm>

#include "common/parallel.hpp"

namespace jacpot {
namespace {

// Calls body(first, count) for parts of all planes, many small ones in a part.
template <class F>
void for_planes(int threads, std::int64_t planes, std::int64_t size, F&& body) {
  constexpr std::int64_t elements = 1 << 14;
  const std::int64_t each = std::max<std::int64_t>(1, elements / size);
  parallel_for(threads, ceil_div(planes, each),
               [&](std::int64_t part) { body(part * each, std::min(planes - part * each, each)); });
}

}  // namespace

template <class T>
Status max_pool(const MaxPool& l, const T* x, std::int64_t planes, bool behind_relu, T* out,
                std::uint8_t* taps, int threads) {
  const auto& kernel = kernels_of<MaxPoolTable, T>();
  for_planes(threads, planes, l.plane(), [&](std::int64_t first, std::int64_t count) {
    kernel.pool(l, x + first * l.plane(), count, behind_relu, out + first * l.pooled(),
                taps + first * l.pooled());
  });
  return {};
}

template <class T>
Status max_pool_backward(const MaxPool& l, const PooledSignals<T>& g, int threads) {
  const auto& kernel = kernels_of<MaxPoolTable, T>();
  const std::int64_t planes = g.n * g.k * g.channels;
  for_planes(threads, planes, l.plane(), [&](std::int64_t first, std::int64_t count) {
    for (std::int64_t p = first; p < first + count; ++p) {
      const std::int64_t c = p % g.channels, k = p / g.channels % g.k, n = p / g.channels / g.k;
      kernel.pull_back(l, g.signals + n * g.signals_example + k * g.signals_output + c * l.pooled(),
                       g.taps + (n * g.channels + c) * l.pooled(), g.out + p * l.plane());
    }
  });
  return {};
}

template Status max_pool<float>(const MaxPool&, const float*, std::int64_t, bool, float*,
                                std::uint8_t*, int);
template Status max_pool<double>(const MaxPool&, const double*, std::int64_t, bool, double*,
                                 std::uint8_t*, int);
template Status max_pool_backward<float>(const MaxPool&, const PooledSignals<float>&, int);
template Status max_pool_backward<double>(const MaxPool&, const PooledSignals<double>&, int);

}  // namespace jacpot
