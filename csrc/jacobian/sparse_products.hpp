// J·v and Jᵀ·u of a layer of which a mask keeps some weights: V a and the gradient of V are sparse,
// and everything that lies between them and the signals stays in cache.
//
// `Layer` has the members of a ProductLayer. `Signals` say how signals meet what is between, of an
// example (R, T·G·O), right-hand sides `stride` apart, given as much room:
//   data(), begin(example)     where the signals of an example begin, so that they can be fetched
//   needs_room()
//   dot(example, z, r, stride, room, out)        out (K, R) += ⟨δ_k, z⟩
//   combine(example, u, r, stride, room, w)      w = Σ_k u_k δ_k
#pragma once

#include <algorithm>
#include <atomic>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "jacobian/products.hpp"

namespace jacpot {

inline constexpr Status no_memory_for_products{Code::out_of_memory,
                                               "not enough memory for the products"};

template <class T, class Layer>
void add_bias(const Layer& l, const T* bias, T* z) {
  const std::int64_t units = l.groups * l.outputs;
  for (std::int64_t t = 0; t < l.positions; ++t)
    for (std::int64_t o = 0; o < units; ++o) z[t * units + o] += bias[o];
}

// What a worker of a sparse product holds of a few examples: V a or Σ_k u_k δ_k, (R, examples,
// T·G·O), which stays in its cache, and packed blocks of activations and of that.
struct SparseWorker {
  std::int64_t length, examples, stride, room, size;

  template <class Layer>
  SparseWorker(const Layer& l, std::int64_t r, std::int64_t block, bool needs_room)
      : length(l.positions * l.groups * l.outputs),
        examples(std::max<std::int64_t>(1, block / std::max<std::int64_t>(1, l.positions))),
        stride(examples * length),
        room(needs_room ? r * stride : 0),
        size((r * stride + room + (l.inputs + l.outputs) * block + 63) / 64 * 64) {}
};

// out (N, K, R) += J · vᵀ for v (R, P).
template <class T, class Layer, class Signals>
Status sparse_jvp(const Layer& l, const Signals& signals, const T* v, std::int64_t r, T* out,
                  int threads) {
  const auto& kernel = kernels_of<ProductTable, T>();
  const std::int64_t block = kernel.forward_block, units = l.groups * l.outputs,
                     width = l.groups * l.inputs, parameters = l.parameters();
  const SparseWorker held(l, r, block, signals.needs_room());
  const Scratch<T> memory = allocate_scratch<T>(held.size * threads);
  if (!memory) return no_memory_for_products;
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    T* z = memory.get() + worker * held.size;
    T* room = z + r * held.stride;
    T* x = room + held.room;
    for (std::int64_t first;
         (first = next.fetch_add(held.examples, std::memory_order_relaxed)) < l.n;) {
      const std::int64_t examples = std::min(held.examples, l.n - first);
      const std::int64_t rows = examples * l.positions;
      const T* from = l.activations + first * l.positions * width;
      // Signals of all these examples, a part in each of the products before they are read.
      const T* ahead = signals.data() + signals.begin(first);
      const std::int64_t ahead_size = (signals.begin(first + examples) - signals.begin(first)) /
                                      (l.groups * ceil_div(rows, block));
      for (std::int64_t g = 0; g < l.groups; ++g)
        for (std::int64_t row = 0; row < rows; row += block) {
          const std::int64_t count = std::min(block, rows - row);
          kernel.pack(from + row * width + g * l.inputs, width, count, l.inputs, block, x);
          for (std::int64_t j = 0; j < r; ++j)
            kernel.multiply(x, l.row_offsets + g * l.outputs, l.columns, v + j * parameters,
                            l.outputs, count, z + j * held.stride + row * units + g * l.outputs,
                            units, x + l.inputs * block, ahead, j == 0 ? ahead_size : 0);
          ahead += ahead_size;
        }
      for (std::int64_t i = 0; i < examples; ++i) {
        T* own = z + i * held.length;
        for (std::int64_t j = 0; l.bias && j < r; ++j)
          add_bias(l, v + j * parameters + l.weights(), own + j * held.stride);
        signals.dot(first + i, own, r, held.stride, room, out + (first + i) * l.k * r);
      }
    }
  });
  return {};
}

// out (R, P) = uᵀ · J for u (N, K, R).
template <class T, class Layer, class Signals>
Status sparse_vjp(const Layer& l, const Signals& signals, const T* u, std::int64_t r, T* out,
                  int threads) {
  const auto& kernel = kernels_of<ProductTable, T>();
  const std::int64_t block = kernel.backward_block, units = l.groups * l.outputs,
                     width = l.groups * l.inputs, parameters = l.parameters();
  const SparseWorker held(l, r, block, signals.needs_room());
  const Scratch<T> memory = allocate_scratch<T>(held.size * threads);
  // Every worker adds into a copy of its own, always of the same examples: results repeat exactly.
  const Scratch<T> partial = allocate_scratch<T>(r * parameters * threads);
  if (!memory || !partial) return no_memory_for_products;
  const std::int64_t each = ceil_div(l.n, threads);
  parallel_for(threads, threads, [&](std::int64_t worker) {
    T* w = memory.get() + worker * held.size;
    T* room = w + r * held.stride;
    T* x = room + held.room;
    T* w_packed = x + l.inputs * block;
    T* sums = partial.get() + worker * r * parameters;
    std::fill_n(sums, r * parameters, T(0));
    const std::int64_t end = std::min(l.n, (worker + 1) * each);
    for (std::int64_t first = worker * each; first < end; first += held.examples) {
      const std::int64_t examples = std::min(held.examples, end - first);
      const std::int64_t rows = examples * l.positions;
      const T* from = l.activations + first * l.positions * width;
      for (std::int64_t i = 0; i < examples; ++i)
        signals.combine(first + i, u + (first + i) * l.k * r, r, held.stride, room,
                        w + i * held.length);
      for (std::int64_t g = 0; g < l.groups; ++g)
        for (std::int64_t row = 0; row < rows; row += block) {
          const std::int64_t count = std::min(block, rows - row);
          kernel.pack(from + row * width + g * l.inputs, width, count, l.inputs, block, x);
          for (std::int64_t j = 0; j < r; ++j) {
            kernel.pack(w + j * held.stride + row * units + g * l.outputs, units, count, l.outputs,
                        block, w_packed);
            kernel.sample(w_packed, x, l.row_offsets + g * l.outputs, l.columns, l.outputs,
                          sums + j * parameters);
          }
        }
      for (std::int64_t j = 0; l.bias && j < r; ++j)
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t o = 0; o < units; ++o)
            sums[j * parameters + l.weights() + o] += w[j * held.stride + row * units + o];
    }
  });
  std::copy_n(partial.get(), r * parameters, out);
  for (std::int64_t worker = 1; worker < threads; ++worker)
    for (std::int64_t e = 0; e < r * parameters; ++e)
      out[e] += partial[worker * r * parameters + e];
  return {};
}

}  // namespace jacpot
