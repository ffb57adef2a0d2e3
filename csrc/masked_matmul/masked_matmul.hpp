// Products with a sparse weight W of fixed pattern, forward and backward, for one thread team:
//   Y = X·Wᵀ + b,   dX = dY·W,   dW = (dYᵀ·X) on the pattern only.
// The batch lies along the SIMD lanes, so no index is ever gathered from inside a vector.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "masked_matmul/pattern.hpp"

namespace jacpot::masked_matmul {

// `examples` vectors of `features`; any strides. Row-major has feature_stride 1, feature-major
// has example_stride 1.
template <class T>
struct Activations {
  T* data = nullptr;
  std::int64_t examples = 0, features = 0;
  std::int64_t example_stride = 0, feature_stride = 0;
};

// y (N, rows) = x (N, columns) · Wᵀ + bias, then max(·, 0) when `relu`. `bias` may be null.
template <class T>
Status forward(const Pattern& pattern, const T* values, const T* bias, bool relu,
               Activations<const T> x, Activations<T> y, int threads);

// From dy (N, rows): dx (N, columns) and d_values (nnz,), together or either alone (the other's
// pointer null). `x` is read for d_values only, `values` for dx only.
template <class T>
Status backward(const Pattern& pattern, const T* values, Activations<const T> x,
                Activations<const T> dy, Activations<T> dx, T* d_values, int threads);

}  // namespace jacpot::masked_matmul
