#include "max_pool/max_pool.hpp"

#include <algorithm>

#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace jacpot {
namespace {

// Calls body(plane, task) for every plane, many small ones in a task.
template <class F>
void for_planes(int threads, std::int64_t planes, std::int64_t size, F&& body) {
  constexpr std::int64_t elements = 1 << 14;
  const std::int64_t each = std::max<std::int64_t>(1, elements / size);
  parallel_for(threads, ceil_div(planes, each), [&](std::int64_t task) {
    for (std::int64_t p = task * each; p < std::min(planes, (task + 1) * each); ++p) body(p, task);
  });
}

}  // namespace

template <class T>
Status max_pool(const MaxPool& l, const T* x, std::int64_t planes, bool behind_relu, T* out,
                std::uint8_t* taps, int threads) {
  const auto& kernel = kernels_of<MaxPoolTable, T>();
  const Scratch<T> rows = allocate_scratch<T>(planes * l.places[1]);
  if (!rows) return {Code::out_of_memory, "not enough memory for the taps of a row"};
  for_planes(threads, planes, l.plane(), [&](std::int64_t p, std::int64_t task) {
    kernel.pool(l, x + p * l.plane(), behind_relu, out + p * l.pooled(), taps + p * l.pooled(),
                rows.get() + task * l.places[1]);
  });
  return {};
}

template <class T>
Status max_pool_backward(const MaxPool& l, const PooledSignals<T>& g, int threads) {
  const auto& kernel = kernels_of<MaxPoolTable, T>();
  for_planes(threads, g.n * g.k * g.channels, l.plane(), [&](std::int64_t p, std::int64_t) {
    const std::int64_t c = p % g.channels, k = p / g.channels % g.k, n = p / g.channels / g.k;
    kernel.pull_back(l, g.signals + n * g.signals_example + k * g.signals_output + c * l.pooled(),
                     g.taps + (n * g.channels + c) * l.pooled(), g.out + p * l.plane());
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
