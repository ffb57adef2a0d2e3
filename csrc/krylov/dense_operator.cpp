#include "krylov/dense_operator.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/blas.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "krylov/row_kernels.hpp"
#include "krylov/symmetric.hpp"
#include "krylov/vector_kernels.hpp"

namespace jacpot::krylov {
namespace {

constexpr std::int64_t packed_bytes = 32 << 20;  // what caches hold; beyond, memory sets the pace
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
  bool calls_out(std::int64_t count) const override { return count != 1; }
  Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const override {
    return multiply(false, x, y, count, accuracy);
  }
  Status apply_transposed(const double* x, double* y, std::int64_t count,
                          Accuracy accuracy) const override {
    return multiply(true, x, y, count, accuracy);
  }
  Status apply_both(const double* v, double alpha, double* u, double* w, double*,
                    Accuracy accuracy) const override {
    return accuracy == Accuracy::full ? pass<double>(v, alpha, u, u, w)
                                      : pass<T>(v, alpha, u, u, w);
  }

 private:
  Status multiply(bool transposed, const double* x, double* y, std::int64_t count,
                  Accuracy accuracy) const {
    if (count == 1) {
      if (accuracy == Accuracy::working && symmetric_) return half(x, y);
      return accuracy == Accuracy::full ? one<double>(transposed, x, y) : one<T>(transposed, x, y);
    }
    if constexpr (std::is_same_v<T, double>)
      return gemm(transposed, x, y, count);
    else
      return accuracy == Accuracy::full ? widened(transposed, x, y, count)
                                        : narrowed(transposed, x, y, count);
  }
  Status gemm(bool transposed, const T* x, T* y, std::int64_t count) const {
    const std::int64_t m = transposed ? columns() : rows(), k = transposed ? rows() : columns();
    if (k == 0) std::fill(y, y + m * count, T(0));
    return blas::gemm(transposed, false, m, count, k, T(1), matrix_.data, matrix_.stride[0], x,
                      count, T(0), y, count);
  }
  std::int64_t tasks() const {
    return std::clamp<std::int64_t>(rows() * columns() / (1 << 16), 1, std::max(threads_, 1));
  }
  // One vector, from all of the matrix, with arithmetic in S.
  template <class S>
  Status one(bool transposed, const double* x, double* y) const {
    return transposed ? pass<S>(nullptr, -1, x, nullptr, y) : pass<S>(x, 0, nullptr, y, nullptr);
  }
  // In one pass over the matrix u = A·v - alpha·before, where there are v and `before`, and
  // w = Aᵀ·u, where that is wanted. Each task has a band of rows, and a w of its own.
  template <class S>
  Status pass(const double* v, double alpha, const double* before, double* u, double* w) const {
    const RowKernels<T, S>& kernel = row_kernels<S>();
    const Staging<S>& stage = staging<S>();
    const std::int64_t m = rows(), n = columns(), width = (n + 63) / 64 * 64;
    const std::int64_t step = RowTable::block, blocks = (m + step - 1) / step;
    const std::int64_t stride = matrix_.stride[0];
    const auto buffer = allocate_scratch<S>(m + 64 + (tasks() + 1) * width);
    if (!buffer) return no_memory;
    S *x = buffer.get(), *sums = x + width, *y = sums + tasks() * width;
    if (v) stage.load(n, 1, v, x);
    before ? stage.load(m, -alpha, before, y) : std::fill(y, y + m, S(0));
    parallel_for(threads_, tasks(), [&](std::int64_t task) {
      S* sum = sums + task * width;
      if (w) std::fill(sum, sum + n, S(0));
      const std::int64_t end = blocks * (task + 1) / tasks();
      for (std::int64_t i = blocks * task / tasks(); i < end; ++i) {
        const std::int64_t row = i * step, height = std::min(step, m - row);
        const T* a = matrix_.data + row * stride;
        if (v) kernel.add(a, stride, height, n, x, y + row);
        const bool last = row + 2 * step > m;
        if (w)
          kernel.add_transposed(a, stride, height, n, y + row, sum, last ? a : a + step * stride);
      }
    });
    if (u) stage.add_up(m, 1, y, 0, u);
    if (w) stage.add_up(n, tasks(), sums, width, w);
    return {};
  }
  // One vector, from the upper half of the matrix; each task has a result of its own.
  Status half(const double* x, double* y) const {
    const std::int64_t n = rows();
    if (!packed_ && n * n * std::int64_t{sizeof(T)} <= 2 * packed_bytes)
      if (const Status status = pack(); !status.ok()) return status;
    const std::int64_t size = packed_ ? packed_->size : n;
    const auto own = packed_ ? Scratch<T>() : allocate_scratch<T>((tasks() + 1) * (size + 64));
    T* narrow = packed_ ? packed_->vectors.get() : own.get();
    if (!narrow) return no_memory;
    T* partial = narrow + size;
    staging<T>().load(n, 1, x, narrow);
    std::fill(narrow + n, narrow + size, T(0));
    parallel_for(threads_, tasks(), [&](std::int64_t task) {
      T* out = partial + task * size;
      std::fill(out, out + size, T(0));
      packed_ ? add_bands(task, narrow, out) : add_strips(task, narrow, out);
    });
    staging<T>().add_up(n, tasks(), partial, size, y);
    downwards_ = !downwards_;
    return {};
  }
  // Interleaved strips of rows even out the work.
  void add_strips(std::int64_t task, const T* x, T* out) const {
    constexpr std::int64_t strip = 32;
    const std::int64_t n = rows();
    for (std::int64_t begin = task * strip; begin < n; begin += tasks() * strip)
      kernels().multiply(matrix_.data, matrix_.stride[0], n, begin, std::min(n, begin + strip), x,
                         out);
  }
  // Every other product goes backwards: it begins with what the one before has left in the cache.
  void add_bands(std::int64_t task, const T* x, T* out) const {
    const std::int64_t step = tasks(), count = (packed_->bands() - task + step - 1) / step;
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t i = task + (downwards_ ? k : count - 1 - k) * step;
      packed_->kernels.multiply_band(packed_->data.get() + packed_->offsets[i],
                                     i * packed_->kernels.band_rows, packed_->size, x, out);
    }
  }
  // The instruction set stays that of the packing.
  Status pack() const {
    const SymmetricKernels<T>& kernel = kernels();
    const std::int64_t n = rows(), size = (n + kernel.block - 1) / kernel.block * kernel.block;
    const std::int64_t bands = size / kernel.band_rows;
    auto packed = std::make_unique<Packed>(Packed{kernel, size, {}, {}, {}});
    packed->offsets.resize(static_cast<std::size_t>(bands));
    // What one task reads lies together: a contiguous piece takes equally of all sets of a cache.
    std::int64_t elements = 0;
    for (std::int64_t task = 0; task < tasks(); ++task)
      for (std::int64_t i = task; i < bands; i += tasks()) {
        packed->offsets[static_cast<std::size_t>(i)] = elements;
        elements += kernel.band_size(i * kernel.band_rows, size);
      }
    packed->data = allocate_resident<T>(elements);
    packed->vectors = allocate_scratch<T>((tasks() + 1) * size);
    if (!packed->data || !packed->vectors) return no_memory;
    parallel_for(threads_, tasks(), [&](std::int64_t task) {
      for (std::int64_t i = task; i < packed->bands(); i += tasks())
        kernel.pack_band(matrix_.data, matrix_.stride[0], n, i * kernel.band_rows, size,
                         packed->data.get() + packed->offsets[i]);
    });
    packed_ = std::move(packed);
    return {};
  }
  static const SymmetricKernels<T>& kernels() {
    const SymmetricTable& table = active_table(static_cast<const SymmetricTable*>(nullptr));
    if constexpr (std::is_same_v<T, float>)
      return table.single_precision;
    else
      return table.double_precision;
  }
  template <class S>
  static const RowKernels<T, S>& row_kernels() {
    const RowTable& table = active_table(static_cast<const RowTable*>(nullptr));
    if constexpr (std::is_same_v<S, float>)
      return table.single_precision;
    else if constexpr (std::is_same_v<T, double>)
      return table.double_precision;
    else
      return table.widened;
  }
  template <class S>
  static const Staging<S>& staging() {
    const VectorTable& table = active_table(static_cast<const VectorTable*>(nullptr));
    if constexpr (std::is_same_v<S, float>)
      return table.single_precision;
    else
      return table.double_precision;
  }
  // The whole product in float32.
  Status narrowed(bool transposed, const double* x, double* y, std::int64_t count) const {
    const std::int64_t in = (transposed ? rows() : columns()) * count;
    const std::int64_t out = (transposed ? columns() : rows()) * count;
    const auto buffer = allocate_scratch<T>(in + out);
    if (!buffer) return no_memory;
    T* narrow_y = buffer.get() + in;
    std::transform(x, x + in, buffer.get(), [](double v) { return static_cast<T>(v); });
    const Status status = gemm(transposed, buffer.get(), narrow_y, count);
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

  struct Packed {
    SymmetricKernels<T> kernels;
    std::int64_t size;  // rounded up
    std::vector<std::int64_t> offsets;
    Scratch<T> data;
    Scratch<T> vectors;  // x, and a result for each task

    std::int64_t bands() const { return static_cast<std::int64_t>(offsets.size()); }
  };

  const View<const T, 2> matrix_;
  const bool symmetric_;
  const int threads_;
  mutable std::unique_ptr<Packed> packed_;
  mutable bool downwards_ = true;
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
