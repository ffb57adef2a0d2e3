// The two products with the weight W (outputs, inputs) of a linear layer at which a BLAS is slow.
//
// Forward, for few examples: W is read once, at the speed of memory, as it lies; a BLAS packs it
// first, which costs as much as the product.
//
// Backward, for K signals of each example: behind a ReLU all signals of an example are zero at the
// same outputs, those that are off. Only the rows of W that an example meets are multiplied, for
// all its signals at once, so that half of the zeros save half of the time.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "common/view.hpp"

namespace jacpot::linear_layer {

// y (N, O) = x (N, I) · Wᵀ + bias (O,), which may be null. Last axes have stride 1.
template <class T>
Status forward(View<const T, 2> x, View<const T, 2> weight, const T* bias, View<T, 2> y,
               int threads);

// out (N, K, I) = signals (N, K, O) · W. Last axes have stride 1. What is not finite in W meets
// zeros as in the dense product: 0 · inf is nan.
template <class T>
Status backward(View<const T, 3> signals, View<const T, 2> weight, View<T, 3> out, int threads);

}  // namespace jacpot::linear_layer
