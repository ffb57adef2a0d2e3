#include "jacobian/products.hpp"

#include <algorithm>

#include "common/blas.hpp"
#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "jacobian/sparse_products.hpp"

namespace jacpot {
namespace {

constexpr std::int64_t chunk_bytes = 2 << 20;  // of what lies between the two halves of a product
constexpr std::int64_t gathered_bytes = 256 << 10;  // of activations, half an L2 cache or less

// What V a or Σ_k u_k δ_k of a chunk of examples is, (R, examples, T·G·O), and room for it as
// signals with their positions innermost meet it, (R, examples, G·O·T).
template <class T>
struct Between {
  std::int64_t length, examples, stride;  // of one right-hand side
  Scratch<T> data, turned;

  Between(const ProductLayer<T>& l, std::int64_t r)
      : length(l.positions * l.groups * l.outputs),
        examples(std::clamp(
            chunk_bytes / std::max<std::int64_t>(1, length * r * std::int64_t{sizeof(T)}),
            std::int64_t{1}, l.n)),
        stride(examples * length),
        data(allocate_scratch<T>(r * stride)),
        turned(allocate_scratch<T>(l.positions_innermost ? r * stride : 0)) {}

  bool failed() const { return !data || !turned; }
};

// A few examples at a time, so that claiming a task costs little.
template <class F>
void for_examples(int threads, std::int64_t count, std::int64_t work, F&& body) {
  const std::int64_t each = std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(1, work));
  parallel_for(threads, (count + each - 1) / each, [&](std::int64_t task) {
    for (std::int64_t i = task * each; i < std::min(count, (task + 1) * each); ++i) body(i);
  });
}

// to (R, columns, rows) = from (R, rows, columns), right-hand sides `stride` apart.
template <class T>
void turn(const ProductKernels<T>& kernel, const T* from, std::int64_t rows, std::int64_t columns,
          std::int64_t r, std::int64_t stride, T* to) {
  for (std::int64_t j = 0; j < r; ++j)
    kernel.pack(from + j * stride, columns, rows, columns, rows, to + j * stride);
}

// Signals of all units, as sparse products meet them.
template <class T>
struct AllSignals {
  const ProductLayer<T>& l;
  const ProductKernels<T>& kernel = kernels_of<ProductTable, T>();
  const std::int64_t units = l.groups * l.outputs, length = l.positions * units;

  const T* data() const { return l.signals; }
  std::int64_t begin(std::int64_t example) const { return example * l.signals_example; }
  bool needs_room() const { return l.positions_innermost; }

  void dot(std::int64_t example, const T* z, std::int64_t r, std::int64_t stride, T* turned,
           T* out) const {
    if (l.positions_innermost) turn(kernel, z, l.positions, units, r, stride, turned);
    kernel.dot(l.signals + begin(example), l.k, l.signals_output, length,
               l.positions_innermost ? turned : z, r, stride, l.squared, out);
  }
  void combine(std::int64_t example, const T* u, std::int64_t r, std::int64_t stride, T* turned,
               T* w) const {
    kernel.combine(l.signals + begin(example), l.k, l.signals_output, length, u, r, stride,
                   l.squared, l.positions_innermost ? turned : w);
    if (l.positions_innermost) turn(kernel, turned, units, l.positions, r, stride, w);
  }
};

template <class T>
Status dense_jvp(const ProductLayer<T>& l, const T* v, std::int64_t r, T* out, int threads) {
  const auto& kernel = kernels_of<ProductTable, T>();
  const std::int64_t units = l.groups * l.outputs, width = l.groups * l.inputs,
                     parameters = l.parameters();
  Between<T> z(l, r);
  if (z.failed()) return no_memory_for_products;
  for (std::int64_t first = 0; first < l.n; first += z.examples) {
    const std::int64_t examples = std::min(z.examples, l.n - first), rows = examples * l.positions;
    const T* x = l.activations + first * l.positions * width;
    for (std::int64_t g = 0; g < l.groups; ++g)
      for (std::int64_t j = 0; j < r; ++j) {
        const Status status =
            blas::gemm(false, true, rows, l.outputs, l.inputs, T(1), x + g * l.inputs, width,
                       v + j * parameters + g * l.outputs * l.inputs, l.inputs, T(0),
                       z.data.get() + j * z.stride + g * l.outputs, units);
        if (!status.ok()) return status;
      }
    for_examples(threads, examples, l.k * z.length, [&](std::int64_t i) {
      T* own = z.data.get() + i * z.length;
      for (std::int64_t j = 0; l.bias && j < r; ++j)
        add_bias(l, v + j * parameters + l.weights(), own + j * z.stride);
      if (l.positions_innermost) {
        T* turned = z.turned.get() + i * z.length;
        turn(kernel, own, l.positions, units, r, z.stride, turned);
        own = turned;
      }
      kernel.dot(l.signals + (first + i) * l.signals_example, l.k, l.signals_output, z.length, own,
                 r, z.stride, l.squared, out + (first + i) * l.k * r);
    });
  }
  return {};
}

template <class T>
Status dense_vjp(const ProductLayer<T>& l, const T* u, std::int64_t r, T* out, int threads) {
  const auto& kernel = kernels_of<ProductTable, T>();
  const std::int64_t units = l.groups * l.outputs, width = l.groups * l.inputs,
                     parameters = l.parameters();
  Between<T> w(l, r);
  if (w.failed()) return no_memory_for_products;
  std::fill_n(out, r * parameters, T(0));
  for (std::int64_t first = 0; first < l.n; first += w.examples) {
    const std::int64_t examples = std::min(w.examples, l.n - first), rows = examples * l.positions;
    const T* x = l.activations + first * l.positions * width;
    for_examples(threads, examples, l.k * w.length, [&](std::int64_t i) {
      T* own = w.data.get() + i * w.length;
      T* turned = w.turned.get() + i * w.length;
      kernel.combine(l.signals + (first + i) * l.signals_example, l.k, l.signals_output, w.length,
                     u + (first + i) * l.k * r, r, w.stride, l.squared,
                     l.positions_innermost ? turned : own);
      if (l.positions_innermost) turn(kernel, turned, units, l.positions, r, w.stride, own);
    });
    for (std::int64_t g = 0; g < l.groups; ++g)
      for (std::int64_t j = 0; j < r; ++j) {
        const Status status =
            blas::gemm(true, false, l.outputs, l.inputs, rows, T(1),
                       w.data.get() + j * w.stride + g * l.outputs, units, x + g * l.inputs, width,
                       T(1), out + j * parameters + g * l.outputs * l.inputs, l.inputs);
        if (!status.ok()) return status;
      }
    constexpr std::int64_t span = 64;
    if (l.bias)
      parallel_for(threads, r * ((units + span - 1) / span), [&](std::int64_t task) {
        const std::int64_t j = task % r, begin = task / r * span;
        T* sums = out + j * parameters + l.weights();
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t o = begin; o < std::min(units, begin + span); ++o)
            sums[o] += w.data[j * w.stride + row * units + o];
      });
  }
  return {};
}

}  // namespace

template <class T>
Status jvp(const ProductLayer<T>& l, const T* v, std::int64_t r, T* out, int threads) {
  if (l.empty() || r == 0) return {};
  return l.row_offsets ? sparse_jvp(l, AllSignals<T>{l}, v, r, out, threads)
                       : dense_jvp(l, v, r, out, threads);
}

template <class T>
Status vjp(const ProductLayer<T>& l, const T* u, std::int64_t r, T* out, int threads) {
  if (l.empty() || r == 0) {
    std::fill_n(out, r * l.parameters(), T(0));
    return {};
  }
  return l.row_offsets ? sparse_vjp(l, AllSignals<T>{l}, u, r, out, threads)
                       : dense_vjp(l, u, r, out, threads);
}

template <class T>
Status generate_rows(const RowsLayer<T>& l, T* out, std::int64_t row_stride, int threads) {
  const auto& kernel = kernels_of<ProductTable, T>();
  const bool many = l.positions != 1 || l.places;
  const bool turned = many && l.signals_unit != 1 && l.outputs > 1;
  // Activations that are no whole vectors, or not written out, are gathered for all outputs of an
  // example, as many runs at a time as stay in cache.
  const bool gathered = many && (l.places || l.inputs % kernel.width != 0);
  constexpr std::int64_t written = 0;
  const std::int64_t* runs = l.places ? l.runs : &written;
  const std::int64_t run = l.places ? l.run : l.inputs, count = run ? l.inputs / run : 0;
  const std::int64_t bytes = l.positions * run * std::int64_t{sizeof(T)};
  const std::int64_t at_once =
      gathered && bytes ? std::clamp(gathered_bytes / bytes, std::int64_t{1}, count) : count;
  const std::int64_t chunks = count ? (count + at_once - 1) / at_once : 0;
  const std::int64_t padded = (at_once * run + kernel.width - 1) / kernel.width * kernel.width;
  const std::int64_t held_size = gathered ? l.positions * padded + kernel.width : 0;
  const std::int64_t scratch_size = held_size + (turned ? l.positions * l.outputs : 0);
  const Scratch<T> scratch = allocate_scratch<T>(scratch_size * threads);
  if (!scratch) return no_memory_for_products;
  advise_huge_pages(out, static_cast<std::size_t>(l.n * l.k * row_stride) * sizeof(T));
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    T* held = scratch.get() + worker * scratch_size;
    std::int64_t holds = -1;
    for (std::int64_t task;
         (task = next.fetch_add(1, std::memory_order_relaxed)) < l.n * l.groups * chunks * l.k;) {
      const std::int64_t source = task / l.k, output = task % l.k;
      const std::int64_t first = source % chunks * at_once, own = std::min(at_once, count - first);
      const std::int64_t g = source / chunks % l.groups, example = source / chunks / l.groups;
      const T* activation =
          l.activations + example * l.activations_example + g * l.activations_group;
      const T* signal =
          l.signals + example * l.signals_example + output * l.signals_output + g * l.signals_group;
      T* to = out + (example * l.k + output) * row_stride + g * l.outputs * l.inputs + first * run;
      if (!many) {
        kernel.outer(signal, l.outputs, activation, l.inputs, to);
        continue;
      }
      std::int64_t activation_step = l.activations_position, signal_step = l.signals_position;
      if (gathered && holds != source)
        for (std::int64_t t = 0; t < l.positions; ++t)
          kernel.gather(activation + (l.places ? l.places[t] : t * l.activations_position),
                        runs + first, own, run, held + t * padded);
      holds = source;
      if (gathered) {
        activation = held;
        activation_step = padded;
      }
      if (turned) {
        kernel.pack(signal, l.signals_unit, l.outputs, l.positions, l.outputs, held + held_size);
        signal = held + held_size;
        signal_step = l.outputs;
      }
      kernel.sum_outer(signal, signal_step, l.outputs, activation, activation_step, own * run,
                       l.positions, to, l.inputs);
    }
  });
  return {};
}

template Status jvp<float>(const ProductLayer<float>&, const float*, std::int64_t, float*, int);
template Status jvp<double>(const ProductLayer<double>&, const double*, std::int64_t, double*, int);
template Status vjp<float>(const ProductLayer<float>&, const float*, std::int64_t, float*, int);
template Status vjp<double>(const ProductLayer<double>&, const double*, std::int64_t, double*, int);
template Status generate_rows<float>(const RowsLayer<float>&, float*, std::int64_t, int);
template Status generate_rows<double>(const RowsLayer<double>&, double*, std::int64_t, int);

}  // namespace jacpot
