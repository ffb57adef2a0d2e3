#include "jacobian/plain_signals.hpp"

#include <atomic>

#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace jacpot {

template <class T>
Status plain_signals(const PlainSignals<T>& l, int threads) {
  const auto& kernel = kernels_of<PlainSignalsTable, T>();
  const std::int64_t panels = ceil_div(l.inputs, kernel.columns),
                     panel_size = l.taps() * l.outputs * kernel.columns,
                     size = ceil_div(kernel.scratch_size(l), 64) * 64;
  const Scratch<T> weight = allocate_resident<T>(panels * panel_size),
                   memory = allocate_resident<T>(size * threads);
  if (!weight || !memory) return {Code::out_of_memory, "not enough memory for a turned weight"};
  parallel_for(threads, panels, [&](std::int64_t panel) {
    kernel.turn_weight(l, panel, weight.get() + panel * panel_size);
  });
  const std::int64_t step = l.rows_at_once(kernel.columns), parts = ceil_div(l.size[0], step);
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    for (std::int64_t task;
         (task = next.fetch_add(1, std::memory_order_relaxed)) < l.n * l.k * parts;) {
      const std::int64_t row = task % parts * step;
      kernel.pull_back(l, weight.get(), task / parts, row, std::min(step, l.size[0] - row),
                       memory.get() + worker * size);
    }
  });
  return {};
}

template Status plain_signals<float>(const PlainSignals<float>&, int);
template Status plain_signals<double>(const PlainSignals<double>&, int);

}  // namespace jacpot
