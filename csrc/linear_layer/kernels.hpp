// The bodies that are compiled per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot {

template <class T>
struct LinearLayerKernels {
  // Examples are packed in tiles of `examples`, vector by vector: (tiles, vectors, examples,
  // width), with zeros beyond the last example and input.
  std::int64_t width, examples;
  void (*pack)(const T* x, std::int64_t stride, std::int64_t n, std::int64_t inputs, T* packed);
  // y[n, o] = ⟨x[n], w[o]⟩ + bias[o] of packed examples, for `count` rows of W, best a
  // multiple of `outputs`.
  std::int64_t outputs;
  void (*dots)(const T* packed, std::int64_t n, std::int64_t inputs, const T* w,
               std::int64_t w_stride, std::int64_t count, const T* bias, T* y,
               std::int64_t y_stride);

  // Copies rows of W, `panel` columns of them (or fewer, and zeros), one after the other; tells
  // whether they are finite.
  std::int64_t panel;
  bool (*copy)(const T* w, std::int64_t stride, std::int64_t rows, std::int64_t columns, T* panel);
  // out[q] (+)= Σ_c values[c, q] · panel[rows[c]] for q < k: it is set by the first part of W.
  void (*add_rows)(const std::int32_t* rows, const T* values, std::int64_t count, std::int64_t k,
                   const T* panel, std::int64_t columns, bool first, T* out, std::int64_t stride);
};

struct LinearLayerTable {
  LinearLayerKernels<float> f32;
  LinearLayerKernels<double> f64;
};

JACPOT_DISPATCH_TABLE(LinearLayerTable)

}  // namespace jacpot
