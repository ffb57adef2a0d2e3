// Vector arithmetic of the solvers, on (size, count) row-major blocks of columns. Sums run over
// fixed chunks of rows, so that results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "krylov/vector_kernels.hpp"

namespace jacpot::krylov {

struct Shape {
  std::int64_t size, count;
  int threads;

  static constexpr std::int64_t chunk_elements = 8192;
  std::int64_t chunk_rows() const {
    return std::max<std::int64_t>(1, chunk_elements / std::max<std::int64_t>(1, count));
  }
  std::int64_t chunks() const { return (size + chunk_rows() - 1) / chunk_rows(); }
  std::int64_t elements() const { return size * count; }

  // body(first_row, last_row, chunk)
  template <class Body>
  void for_chunks(Body&& body) const {
    const std::int64_t rows = chunk_rows(), n = size;
    parallel_for(threads, chunks(), [&](std::int64_t chunk) {
      body(chunk * rows, std::min(n, (chunk + 1) * rows), chunk);
    });
  }
};

// Adds up what body(row_begin, row_end, sums) accumulates; `partial` has chunks() * width elements.
template <class Body>
void reduce(const Shape& shape, std::int64_t width, double* partial, double* out, Body&& body) {
  shape.for_chunks([&](std::int64_t begin, std::int64_t end, std::int64_t chunk) {
    double* sums = partial + chunk * width;
    std::fill(sums, sums + width, 0.0);
    body(begin, end, sums);
  });
  std::fill(out, out + width, 0.0);
  for (std::int64_t chunk = 0; chunk < shape.chunks(); ++chunk)
    for (std::int64_t c = 0; c < width; ++c) out[c] += partial[chunk * width + c];
}

inline const VectorTable& vector_kernels() {
  return active_table(static_cast<const VectorTable*>(nullptr));
}

// out[c] = Σ_i x[i, c] · y[i, c]
inline void dots(const Shape& shape, const double* x, const double* y, double* partial,
                 double* out) {
  const VectorTable& kernels = vector_kernels();
  const std::int64_t n = shape.count;
  reduce(shape, n, partial, out, [=, &kernels](std::int64_t begin, std::int64_t end, double* sums) {
    kernels.dot(end - begin, n, x + begin * n, y + begin * n, sums);
  });
}

// y[i, c] = scale[c] · y[i, c] + alpha[c] · x[i, c]
inline void combine(const Shape& shape, const double* alpha, const double* x, const double* scale,
                    double* y) {
  const VectorTable& kernels = vector_kernels();
  const std::int64_t n = shape.count;
  shape.for_chunks([=, &kernels](std::int64_t begin, std::int64_t end, std::int64_t) {
    kernels.combine(end - begin, n, alpha, x + begin * n, scale, y + begin * n);
  });
}

}  // namespace jacpot::krylov
