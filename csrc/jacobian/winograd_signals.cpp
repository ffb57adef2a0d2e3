#include "jacobian/winograd_signals.hpp"

#include <atomic>

#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace jacpot {
template <class T>
Status convolution_signals(const ConvolutionSignals<T>& l, int threads) {
  const auto& kernel = kernels_of<WinogradSignalsTable, T>();
  const std::int64_t size = (kernel.scratch_size(l) + 63) / 64 * 64;
  const Scratch<T> weight = allocate_resident<T>(kernel.weight_size(l)),
                   memory = allocate_resident<T>(size * threads);
  if (!weight || !memory) return {Code::out_of_memory, "not enough memory for transformed tiles"};
  parallel_for(threads, l.outputs,
               [&](std::int64_t output) { kernel.transform_weight(l, output, weight.get()); });
  const std::int64_t images = l.n * l.k, images_step = l.images_at_once(), rows = l.tiles_down(),
                     rows_step = l.rows_at_once(), parts = (rows + rows_step - 1) / rows_step,
                     tasks = (images + images_step - 1) / images_step * parts;
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const std::int64_t image = task / parts * images_step, row = task % parts * rows_step;
      const TileRange tiles{image, std::min(images_step, images - image), row,
                            std::min(rows_step, rows - row)};
      kernel.pull_back(l, weight.get(), tiles, memory.get() + worker * size);
    }
  });
  return {};
}

template Status convolution_signals<float>(const ConvolutionSignals<float>&, int);
template Status convolution_signals<double>(const ConvolutionSignals<double>&, int);

}  // namespace jacpot
