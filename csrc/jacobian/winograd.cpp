#include "jacobian/winograd.hpp"

#include <algorithm>
#include <atomic>

#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace jacpot {
template <class T>
Status convolution_rows(const ConvolutionLayer<T>& l, T* out, int threads) {
  const auto& kernel = kernels_of<WinogradTable, T>();
  const std::int64_t transformed = kernel.activations_size(l),
                     size = (transformed + kernel.scratch_size(l) + 63) / 64 * 64;
  const Scratch<T> memory = allocate_scratch<T>(size * threads);
  if (!memory) return {Code::out_of_memory, "not enough memory for the transformed activations"};
  const std::int64_t chunk = kernel.chunk(l), chunks = (l.inputs + chunk - 1) / chunk,
                     window = (l.height + 2) * (l.width + 2),
                     plane = l.outputs * l.height * l.width, block = l.outputs * l.inputs * 9;
  advise_huge_pages(out, static_cast<std::size_t>(l.n * l.k * l.groups * block) * sizeof(T));
  // The rows of an example after each other, so that transformed activations serve all of them.
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    T* held = memory.get() + worker * size;
    std::int64_t holds = -1;
    for (std::int64_t task;
         (task = next.fetch_add(1, std::memory_order_relaxed)) < l.n * l.groups * chunks * l.k;) {
      const std::int64_t source = task / l.k, output = task % l.k;
      const std::int64_t first = source % chunks * chunk,
                         inputs = std::min(chunk, l.inputs - first);
      const std::int64_t group = source / chunks % l.groups, example = source / chunks / l.groups;
      if (holds != source)
        kernel.transform(l,
                         l.activations + ((example * l.groups + group) * l.inputs + first) * window,
                         inputs, held, held + transformed);
      holds = source;
      kernel.row(
          l, l.signals + example * l.signals_example + output * l.signals_output + group * plane,
          held, inputs, out + ((example * l.k + output) * l.groups + group) * block + first * 9,
          held + transformed);
    }
  });
  return {};
}

template Status convolution_rows<float>(const ConvolutionLayer<float>&, float*, int);
template Status convolution_rows<double>(const ConvolutionLayer<double>&, double*, int);

}  // namespace jacpot
