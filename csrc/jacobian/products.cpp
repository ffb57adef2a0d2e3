#include "jacobian/products.hpp"

#include <algorithm>
#include <atomic>

#include "common/blas.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "jacobian/huge_pages.hpp"

namespace jacpot {
namespace {

constexpr Status no_memory{Code::out_of_memory, "not enough memory for the products"};
constexpr std::int64_t chunk_bytes = 2 << 20;  // of what lies between the two halves of a product

const ProductKernels<float>& kernels(const float*) {
  return active_table(static_cast<const ProductTable*>(nullptr)).f32;
}
const ProductKernels<double>& kernels(const double*) {
  return active_table(static_cast<const ProductTable*>(nullptr)).f64;
}

// What V a or Σ_k u_k δ_k of a chunk of examples is, (R, examples, T·G·O).
template <class T>
struct Between {
  std::int64_t length, examples, stride;  // of one right-hand side
  Scratch<T> data;

  Between(const ProductLayer<T>& l, std::int64_t r)
      : length(l.positions * l.groups * l.outputs),
        examples(std::clamp(
            chunk_bytes / std::max<std::int64_t>(1, length * r * std::int64_t{sizeof(T)}),
            std::int64_t{1}, l.n)),
        stride(examples * length),
        data(allocate_scratch<T>(r * stride)) {}
};

// A few examples at a time, so that claiming a task costs little.
template <class F>
void for_examples(int threads, std::int64_t count, std::int64_t work, F&& body) {
  const std::int64_t each = std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(1, work));
  parallel_for(threads, (count + each - 1) / each, [&](std::int64_t task) {
    for (std::int64_t i = task * each; i < std::min(count, (task + 1) * each); ++i) body(i);
  });
}

}  // namespace

template <class T>
Status jvp(const ProductLayer<T>& l, const T* v, std::int64_t r, T* out, int threads) {
  if (l.n == 0 || l.k == 0 || r == 0) return {};
  const auto& kernel = kernels(v);
  const std::int64_t units = l.groups * l.outputs, parameters = l.parameters(),
                     weights = l.weights();
  const std::int64_t block = kernel.forward_block;
  Between<T> z(l, r);
  const std::int64_t pack_size = l.row_offsets ? (l.inputs + l.outputs) * block : 0;
  const Scratch<T> packed = allocate_scratch<T>(pack_size * threads);
  if (!z.data || !packed) return no_memory;
  for (std::int64_t first = 0; first < l.n; first += z.examples) {
    const std::int64_t examples = std::min(z.examples, l.n - first), rows = examples * l.positions;
    const T* x = l.activations + first * l.positions * l.groups * l.inputs;
    for (std::int64_t g = 0; g < l.groups; ++g) {
      const T* from = x + g * l.inputs;
      T* to = z.data.get() + g * l.outputs;
      if (l.row_offsets) {
        const std::int64_t blocks = (rows + block - 1) / block,
                           each = (blocks + threads - 1) / threads;
        parallel_for(threads, threads, [&](std::int64_t worker) {
          T* x_packed = packed.get() + worker * pack_size;
          for (std::int64_t b = worker * each; b < std::min(blocks, (worker + 1) * each); ++b) {
            const std::int64_t count = std::min(block, rows - b * block);
            kernel.pack(from + b * block * l.groups * l.inputs, l.groups * l.inputs, count,
                        l.inputs, block, x_packed);
            for (std::int64_t j = 0; j < r; ++j)
              kernel.multiply(
                  x_packed, l.row_offsets + g * l.outputs, l.columns, v + j * parameters, l.outputs,
                  count, to + j * z.stride + b * block * units, units, x_packed + l.inputs * block);
          }
        });
      } else {
        for (std::int64_t j = 0; j < r; ++j) {
          const Status status =
              blas::gemm(false, true, rows, l.outputs, l.inputs, T(1), from, l.groups * l.inputs,
                         v + j * parameters + g * l.outputs * l.inputs, l.inputs, T(0),
                         to + j * z.stride, units);
          if (!status.ok()) return status;
        }
      }
    }
    for_examples(threads, examples, l.k * z.length, [&](std::int64_t i) {
      T* own = z.data.get() + i * z.length;
      if (l.bias)
        for (std::int64_t j = 0; j < r; ++j)
          for (std::int64_t t = 0; t < l.positions; ++t)
            for (std::int64_t o = 0; o < units; ++o)
              own[j * z.stride + t * units + o] += v[j * parameters + weights + o];
      kernel.dot(l.signals + (first + i) * l.signals_example, l.k, l.signals_output, z.length, own,
                 r, z.stride, l.squared, out + (first + i) * l.k * r);
    });
  }
  return {};
}

template <class T>
Status vjp(const ProductLayer<T>& l, const T* u, std::int64_t r, T* out, int threads) {
  const std::int64_t units = l.groups * l.outputs, parameters = l.parameters(),
                     weights = l.weights();
  std::fill_n(out, r * parameters, T(0));
  if (l.n == 0 || r == 0) return {};
  const auto& kernel = kernels(u);
  const std::int64_t block = kernel.backward_block;
  Between<T> w(l, r);
  const std::int64_t pack_size = l.row_offsets ? (l.inputs + l.outputs) * block : 0;
  const Scratch<T> packed = allocate_scratch<T>(pack_size * threads);
  // Every worker adds into a copy of its own, always of the same blocks: results repeat exactly.
  const Scratch<T> partial = allocate_scratch<T>(l.row_offsets ? r * weights * threads : 0);
  if (!w.data || !packed || !partial) return no_memory;
  if (l.row_offsets) std::fill_n(partial.get(), r * weights * threads, T(0));
  for (std::int64_t first = 0; first < l.n; first += w.examples) {
    const std::int64_t examples = std::min(w.examples, l.n - first), rows = examples * l.positions;
    const T* x = l.activations + first * l.positions * l.groups * l.inputs;
    for_examples(threads, examples, l.k * w.length, [&](std::int64_t i) {
      kernel.combine(l.signals + (first + i) * l.signals_example, l.k, l.signals_output, w.length,
                     u + (first + i) * l.k * r, r, w.stride, l.squared,
                     w.data.get() + i * w.length);
    });
    for (std::int64_t g = 0; g < l.groups; ++g) {
      const T* from = x + g * l.inputs;
      const T* to = w.data.get() + g * l.outputs;
      if (l.row_offsets) {
        const std::int64_t blocks = (rows + block - 1) / block,
                           each = (blocks + threads - 1) / threads;
        parallel_for(threads, threads, [&](std::int64_t worker) {
          T* x_packed = packed.get() + worker * pack_size;
          T* w_packed = x_packed + l.inputs * block;
          for (std::int64_t b = worker * each; b < std::min(blocks, (worker + 1) * each); ++b) {
            const std::int64_t count = std::min(block, rows - b * block);
            kernel.pack(from + b * block * l.groups * l.inputs, l.groups * l.inputs, count,
                        l.inputs, block, x_packed);
            for (std::int64_t j = 0; j < r; ++j) {
              kernel.pack(to + j * w.stride + b * block * units, units, count, l.outputs, block,
                          w_packed);
              kernel.sample(w_packed, x_packed, l.row_offsets + g * l.outputs, l.columns, l.outputs,
                            partial.get() + (worker * r + j) * weights);
            }
          }
        });
      } else {
        for (std::int64_t j = 0; j < r; ++j) {
          const Status status = blas::gemm(
              true, false, l.outputs, l.inputs, rows, T(1), to + j * w.stride, units, from,
              l.groups * l.inputs, T(1), out + j * parameters + g * l.outputs * l.inputs, l.inputs);
          if (!status.ok()) return status;
        }
      }
    }
    if (l.bias)
      for (std::int64_t j = 0; j < r; ++j)
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t o = 0; o < units; ++o)
            out[j * parameters + weights + o] += w.data[j * w.stride + row * units + o];
  }
  if (l.row_offsets)
    for (std::int64_t worker = 0; worker < threads; ++worker)
      for (std::int64_t j = 0; j < r; ++j)
        for (std::int64_t e = 0; e < weights; ++e)
          out[j * parameters + e] += partial[(worker * r + j) * weights + e];
  return {};
}

template <class T>
Status generate_rows(const RowsLayer<T>& l, T* out, std::int64_t row_stride, int threads) {
  const auto& kernel = kernels(out);
  const bool many = l.positions != 1;
  const std::int64_t scratch_size = many ? l.positions * kernel.tail : 0;
  const Scratch<T> scratch = allocate_scratch<T>(scratch_size * threads);
  if (!scratch) return no_memory;
  advise_huge_pages(out, static_cast<std::size_t>(l.n * l.k * row_stride) * sizeof(T));
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    T* own = scratch.get() + worker * scratch_size;
    for (std::int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < l.n * l.k;)
      for (std::int64_t g = 0; g < l.groups; ++g) {
        const std::int64_t example = row / l.k, output = row % l.k;
        const T* signal = l.signals + example * l.signals_example + output * l.signals_output +
                          g * l.signals_group;
        const T* activation =
            l.activations + example * l.activations_example + g * l.activations_group;
        T* to = out + row * row_stride + g * l.outputs * l.inputs;
        if (many)
          kernel.sum_outer(signal, l.signals_position, l.outputs, activation,
                           l.activations_position, l.inputs, l.positions, to, own);
        else
          kernel.outer(signal, l.outputs, activation, l.inputs, to);
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
