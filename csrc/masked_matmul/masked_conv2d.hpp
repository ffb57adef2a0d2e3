// Two-dimensional convolution with a sparse weight of fixed pattern: the sparse product of the
// weight (out, channels · kernel height · kernel width) with the patches of the images, which are
// gathered panel by panel and never written out.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "masked_matmul/pattern.hpp"

namespace jacpot::masked_matmul {

struct Axis {  // height or width
  std::int64_t input = 0, output = 0, kernel = 1, stride = 1, padding = 0, dilation = 1;
};

struct Images {  // (count, channels, height, width), contiguous
  std::int64_t count = 0, channels = 0;
  Axis height, width;
};

// y (count, rows, height', width') = convolution of x + bias, then max(·, 0) when `relu`.
template <class T>
Status convolve(const Pattern& pattern, const Images& images, const T* values, const T* bias,
                bool relu, const T* x, T* y, int threads);

// From dy: dx and d_values (nnz,), together or either alone (the other null).
template <class T>
Status convolve_backward(const Pattern& pattern, const Images& images, const T* values, const T* x,
                         const T* dy, T* dx, T* d_values, int threads);

}  // namespace jacpot::masked_matmul
