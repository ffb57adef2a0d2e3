#include "krylov/dense_operator.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/blas.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "krylov/symmetric.hpp"

namespace jacpot::krylov {
namespace {

constexpr Status no_memory{Code::out_of_memory, "no memory for a product with a dense matrix"};

template <class T>
class Dense final : public Operator {
 public:
  Dense(View<const T, 2> matrix, bool symmetric, int threads)
      : matrix_(matrix), symmetric_(symmetric), threads_(threads) {}

  std::int64_t rows() const override { return matrix_.shape[0]; }
  std::int64_t columns() const override { return matrix_.shape[1]; }
  double unit_roundoff(Accuracy accuracy) const override {
    return accuracy == Accuracy::full ? std::numeric_limits<double>::epsilon() / 2
                                      : std::numeric_limits<T>::epsilon() / 2;
  }
  Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const override {
    return multiply(false, x, y, count, accuracy);
  }
  Status apply_transposed(const double* x, double* y, std::int64_t count,
                          Accuracy accuracy) const override {
    return multiply(true, x, y, count, accuracy);
  }

 private:
  Status multiply(bool transposed, const double* x, double* y, std::int64_t count,
                  Accuracy accuracy) const {
    if constexpr (std::is_same_v<T, double>) {
      if (accuracy == Accuracy::working && symmetric_ && count == 1) return half(x, y);
      return gemm(transposed, x, y, count);
    } else {
      return accuracy == Accuracy::full ? widened(transposed, x, y, count)
                                        : narrowed(transposed, x, y, count);
    }
  }
  Status gemm(bool transposed, const T* x, T* y, std::int64_t count) const {
    const std::int64_t m = transposed ? columns() : rows(), k = transposed ? rows() : columns();
    if (k == 0) std::fill(y, y + m * count, T(0));
    return blas::gemm(transposed, false, m, count, k, T(1), matrix_.data, matrix_.stride[0], x,
                      count, T(0), y, count);
  }
  // One vector, from the upper half of the matrix. Interleaved strips of rows even out the work;
  // each task has a result of its own.
  Status half(const T* x, T* y) const {
    constexpr std::int64_t strip = 32;
    const std::int64_t n = rows();
    const std::int64_t tasks =
        std::clamp<std::int64_t>(n * n / (1 << 16), 1, std::max(threads_, 1));
    const auto partial = allocate_scratch<T>(tasks * n);
    if (!partial) return no_memory;
    const SymmetricTable& kernels = active_table(static_cast<const SymmetricTable*>(nullptr));
    parallel_for(threads_, tasks, [&](std::int64_t task) {
      T* out = partial.get() + task * n;
      std::fill(out, out + n, T(0));
      for (std::int64_t begin = task * strip; begin < n; begin += tasks * strip) {
        const std::int64_t end = std::min(n, begin + strip);
        if constexpr (std::is_same_v<T, float>)
          kernels.single_precision.multiply(matrix_.data, matrix_.stride[0], n, begin, end, x, out);
        else
          kernels.double_precision.multiply(matrix_.data, matrix_.stride[0], n, begin, end, x, out);
      }
    });
    std::copy(partial.get(), partial.get() + n, y);
    for (std::int64_t task = 1; task < tasks; ++task)
      for (std::int64_t i = 0; i < n; ++i) y[i] += partial[task * n + i];
    return {};
  }
  // The whole product in float32.
  Status narrowed(bool transposed, const double* x, double* y, std::int64_t count) const {
    const std::int64_t in = (transposed ? rows() : columns()) * count;
    const std::int64_t out = (transposed ? columns() : rows()) * count;
    const auto buffer = allocate_scratch<T>(in + out);
    if (!buffer) return no_memory;
    T* narrow_y = buffer.get() + in;
    std::transform(x, x + in, buffer.get(), [](double v) { return static_cast<T>(v); });
    const Status status = symmetric_ && count == 1
                              ? half(buffer.get(), narrow_y)
                              : gemm(transposed, buffer.get(), narrow_y, count);
    std::copy(narrow_y, narrow_y + out, y);
    return status;
  }
  // The float32 matrix with float64 arithmetic: panels of rows are converted while in cache.
  Status widened(bool transposed, const double* x, double* y, std::int64_t count) const {
    constexpr std::int64_t panel = 64;
    const std::int64_t n = columns();
    const auto wide = allocate_scratch<double>(panel * n);
    if (!wide) return no_memory;
    if (transposed || rows() == 0) std::fill(y, y + (transposed ? n : 0) * count, 0.0);
    for (std::int64_t begin = 0; begin < rows(); begin += panel) {
      const std::int64_t height = std::min(panel, rows() - begin);
      parallel_for(threads_, height, [&](std::int64_t i) {
        const T* row = matrix_.data + (begin + i) * matrix_.stride[0];
        std::copy(row, row + n, wide.get() + i * n);
      });
      const Status status = transposed ? blas::gemm(true, false, n, count, height, 1.0, wide.get(),
                                                    n, x + begin * count, count, 1.0, y, count)
                                       : blas::gemm(false, false, height, count, n, 1.0, wide.get(),
                                                    n, x, count, 0.0, y + begin * count, count);
      if (!status.ok()) return status;
    }
    return {};
  }

  const View<const T, 2> matrix_;
  const bool symmetric_;
  const int threads_;
};

}  // namespace

std::unique_ptr<Operator> dense_operator(View<const float, 2> matrix, bool symmetric, int threads) {
  return std::make_unique<Dense<float>>(matrix, symmetric, threads);
}
std::unique_ptr<Operator> dense_operator(View<const double, 2> matrix, bool symmetric,
                                         int threads) {
  return std::make_unique<Dense<double>>(matrix, symmetric, threads);
}

}  // namespace jacpot::krylov
