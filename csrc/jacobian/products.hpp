// J·v and Jᵀ·u of a layer that is given as factors, without its rows:
//
//   (J v)[n,k] = Σ_t ⟨δ_nkt, V a_nt⟩        Jᵀu = Σ_n Σ_t (Σ_k u_nk δ_nkt) a_ntᵀ
//
// V a is a product of dense matrices, or with the sparse V of a mask; its result meets the signals
// while it is in cache, and the signals, the largest array, are read once for all right-hand sides.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "common/status.hpp"

namespace jacpot {

template <class T>
struct ProductLayer {
  std::int64_t n, k, positions, groups, outputs, inputs;
  const T* activations;  // (N, T, G, I), contiguous
  const T* signals;      // (N, K, T, G, O), strides of examples and outputs free
  std::int64_t signals_example, signals_output;
  bool positions_innermost;  // signals are (N, K, G, O, T) instead, as convolutions give them
  const std::int64_t* row_offsets;  // kept weights of the G·O rows, or null for all
  const std::int32_t* columns;
  bool bias;
  bool squared;  // use δ² in place of δ, for norms

  std::int64_t weights() const {
    return row_offsets ? row_offsets[groups * outputs] : groups * outputs * inputs;
  }
  bool empty() const {  // without signals
    return n == 0 || k == 0 || positions == 0 || groups == 0 || outputs == 0;
  }
  std::int64_t parameters() const { return weights() + (bias ? groups * outputs : 0); }
};

// out (N, K, R) += J · vᵀ for v (R, P).
template <class T>
Status jvp(const ProductLayer<T>& layer, const T* v, std::int64_t r, T* out, int threads);

// out (R, P) = uᵀ · J for u (N, K, R).
template <class T>
Status vjp(const ProductLayer<T>& layer, const T* u, std::int64_t r, T* out, int threads);

template <class T>
struct RowsLayer {
  std::int64_t n, k, positions, groups, outputs, inputs;
  const T* activations;  // (N, T, G, I), innermost stride 1
  std::int64_t activations_example, activations_position, activations_group;
  // Or the windows of a convolution, not written out: what position t sees comes in runs of
  // `run` elements, the r-th at activations + places[t] + runs[r]. Null if they are written out.
  const std::int64_t *places, *runs;
  std::int64_t run;
  const T* signals;  // (N, K, T, G, O), stride 1 of units, or of positions as convolutions have it
  std::int64_t signals_example, signals_output, signals_position, signals_group, signals_unit;
};

// out[n, k, 0 : G·O·I] = Σ_t δ_nkt ⊗ a_nt, rows (n, k) `row_stride` apart.
template <class T>
Status generate_rows(const RowsLayer<T>& layer, T* out, std::int64_t row_stride, int threads);

template <class T>
struct ProductKernels {
  std::int64_t forward_block, backward_block;  // rows of activations that a sparse kernel takes
  // out[k·r + j] += ⟨signals[k], z[j]⟩ of one example
  void (*dot)(const T* signals, std::int64_t k, std::int64_t signals_output, std::int64_t length,
              const T* z, std::int64_t r, std::int64_t z_stride, bool squared, T* out);
  // w[j] = Σ_k u[k·r + j] signals[k] of one example
  void (*combine)(const T* signals, std::int64_t k, std::int64_t signals_output,
                  std::int64_t length, const T* u, std::int64_t r, std::int64_t w_stride,
                  bool squared, T* w);
  // dst (columns, block) = x (rows, columns) transposed, zero beyond `rows`
  void (*pack)(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::int64_t block, T* dst);
  // z (rows, outputs) = x · Vᵀ from x packed with forward_block; scratch of outputs ·
  // forward_block. What is needed next, `ahead_size` elements, is fetched from memory meanwhile.
  void (*multiply)(const T* x, const std::int64_t* offsets, const std::int32_t* columns, const T* v,
                   std::int64_t outputs, std::int64_t rows, T* z, std::int64_t z_stride, T* scratch,
                   const T* ahead, std::int64_t ahead_size);
  // g[e] += ⟨w[:, o(e)], x[:, column(e)]⟩ from w and x packed with backward_block
  void (*sample)(const T* w, const T* x, const std::int64_t* offsets, const std::int32_t* columns,
                 std::int64_t outputs, T* g);
  std::int64_t width;  // of a vector
  // to = runs of elements after each other, then zeros up to a whole vector; up to a vector more
  // is written
  void (*gather)(const T* from, const std::int64_t* runs, std::int64_t count, std::int64_t run,
                 T* to);
  // out (outputs, inputs), rows `out_step` apart, = Σ_t δ_t ⊗ a_t of whole vectors of activations
  void (*sum_outer)(const T* signal, std::int64_t signal_step, std::int64_t outputs,
                    const T* activation, std::int64_t activation_step, std::int64_t inputs,
                    std::int64_t positions, T* out, std::int64_t out_step);
  // out (outputs, inputs) = δ ⊗ a
  void (*outer)(const T* signal, std::int64_t outputs, const T* activation, std::int64_t inputs,
                T* out);
};

struct ProductTable {
  ProductKernels<float> f32;
  ProductKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(ProductTable)

}  // namespace jacpot
