// J, J Jᵀ and Jᵀ J of a Jacobian whose blocks lie in memory, as the Krylov solvers multiply by
// them: an iteration runs no Python.
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <variant>

#include "bindings/bind.hpp"
#include "bindings/jacobian_factors.hpp"
#include "bindings/live_factors.hpp"
#include "common/blas.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "krylov/operator.hpp"

namespace jacpot {
namespace {

using krylov::Accuracy;
using krylov::Operator;

enum class Form { jacobian, kernel, gauss_newton };

Form form_named(const std::string& name) {
  if (name == "jacobian") return Form::jacobian;
  if (name == "kernel") return Form::kernel;
  if (name == "gauss_newton") return Form::gauss_newton;
  throw py::value_error("argument 'form' must be 'jacobian', 'kernel' or 'gauss_newton', got '" +
                        name + "'");
}

// Rows (N·K, P) that are given as they are.
template <class T>
struct GivenRows {
  std::int64_t n, p;
  const T* data;

  std::int64_t parameters() const { return p; }
};

// out (N, K, R) += rows · vᵀ for v (R, P)
template <class T>
Status jvp(const GivenRows<T>& rows, const T* v, std::int64_t r, T* out, int) {
  if (rows.n == 0 || rows.p == 0 || r == 0) return {};
  return blas::gemm(false, true, rows.n, r, rows.p, T(1), rows.data, rows.p, v, rows.p, T(1), out,
                    r);
}

// out (R, P) = uᵀ · rows for u (N, K, R)
template <class T>
Status vjp(const GivenRows<T>& rows, const T* u, std::int64_t r, T* out, int) {
  std::fill_n(out, r * rows.p, T(0));
  if (rows.n == 0 || rows.p == 0 || r == 0) return {};
  return blas::gemm(true, false, r, rows.p, rows.n, T(1), u, r, rows.data, rows.p, T(0), out,
                    rows.p);
}

// Layers without the units that are off, which Python holds.
template <class T>
struct GivenLive {
  const LiveLayer<T>* layer;

  std::int64_t parameters() const { return layer->parameters(); }
};

template <class T>
Status jvp(const GivenLive<T>& live, const T* v, std::int64_t r, T* out, int threads) {
  return jvp(*live.layer, v, r, out, threads);
}

template <class T>
Status vjp(const GivenLive<T>& live, const T* u, std::int64_t r, T* out, int threads) {
  return vjp(*live.layer, u, r, out, threads);
}

template <class T>
using Block = std::variant<ProductLayer<T>, GivenLive<T>, GivenRows<T>>;

// to (columns, rows) = from (rows, columns), in another type.
template <class To, class From>
void convert_transposed(const From* from, std::int64_t rows, std::int64_t columns, To* to,
                        std::int64_t to_stride, int threads) {
  constexpr std::int64_t chunk = 1 << 14;
  parallel_for(threads, (rows + chunk - 1) / chunk, [&](std::int64_t task) {
    const std::int64_t end = std::min(rows, (task + 1) * chunk);
    for (std::int64_t j = 0; j < columns; ++j)
      for (std::int64_t i = task * chunk; i < end; ++i)
        to[j * to_stride + i] = static_cast<To>(from[i * columns + j]);
  });
}

template <class To, class From>
void convert(const From* from, std::int64_t count, To* to, int threads) {
  convert_transposed(from, count, 1, to, count, threads);
}

template <class T>
class Products final : public Operator {
 public:
  Products(Form form, std::vector<Block<T>> blocks, std::int64_t outputs, const Operator* exact,
           int threads)
      : form_(form),
        blocks_(std::move(blocks)),
        outputs_(outputs),
        parameters_(0),
        exact_(exact),
        threads_(threads) {
    for (const Block<T>& block : blocks_)
      parameters_ += std::visit([](const auto& b) { return b.parameters(); }, block);
  }

  std::int64_t rows() const override {
    return form_ == Form::gauss_newton ? parameters_ : outputs_;
  }
  std::int64_t columns() const override { return form_ == Form::kernel ? outputs_ : parameters_; }
  double unit_roundoff(Accuracy accuracy) const override {
    return accuracy == Accuracy::full && exact_ ? exact_->unit_roundoff(accuracy)
                                                : std::numeric_limits<T>::epsilon() / 2;
  }
  Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const override {
    if (accuracy == Accuracy::full && exact_) return exact_->apply(x, y, count, accuracy);
    if (const Status status = reserve(count); !status.ok()) return status;
    if (form_ == Form::kernel) return kernel(x, y, count);
    if (const Status status = forward(x, count); !status.ok()) return status;
    if (form_ == Form::gauss_newton) return backward(y, count);
    convert(in_outputs_.get(), outputs_ * count, y, threads_);
    return {};
  }
  Status apply_transposed(const double* x, double* y, std::int64_t count,
                          Accuracy accuracy) const override {
    if (form_ != Form::jacobian) return apply(x, y, count, accuracy);
    if (accuracy == Accuracy::full && exact_)
      return exact_->apply_transposed(x, y, count, accuracy);
    if (const Status status = reserve(count); !status.ok()) return status;
    convert(x, outputs_ * count, in_outputs_.get(), threads_);
    return backward(y, count);
  }

 private:
  // A block at a time, so that its factors may still be in cache when they are used again.
  Status kernel(const double* x, double* y, std::int64_t count) const {
    T* u = in_outputs_.get();
    T* sums = u + outputs_ * count;
    convert(x, outputs_ * count, u, threads_);
    std::fill_n(sums, outputs_ * count, T(0));
    for (const Block<T>& block : blocks_) {
      const Status status = std::visit(
          [&](const auto& b) {
            const Status first = vjp(b, u, count, in_parameters_.get(), threads_);
            return first.ok() ? jvp(b, in_parameters_.get(), count, sums, threads_) : first;
          },
          block);
      if (!status.ok()) return status;
    }
    convert(sums, outputs_ * count, y, threads_);
    return {};
  }
  // in_outputs_ = J x
  Status forward(const double* x, std::int64_t count) const {
    std::fill_n(in_outputs_.get(), outputs_ * count, T(0));
    for (const Block<T>& block : blocks_) {
      const Status status = std::visit(
          [&](const auto& b) {
            const std::int64_t p = b.parameters();
            convert_transposed(x, p, count, in_parameters_.get(), p, threads_);
            x += p * count;
            return jvp(b, in_parameters_.get(), count, in_outputs_.get(), threads_);
          },
          block);
      if (!status.ok()) return status;
    }
    return {};
  }
  // y = Jᵀ in_outputs_
  Status backward(double* y, std::int64_t count) const {
    for (const Block<T>& block : blocks_) {
      const Status status = std::visit(
          [&](const auto& b) {
            const std::int64_t p = b.parameters();
            const Status product = vjp(b, in_outputs_.get(), count, in_parameters_.get(), threads_);
            if (product.ok())
              convert_transposed(in_parameters_.get(), count, p, y, count, threads_);
            y += p * count;
            return product;
          },
          block);
      if (!status.ok()) return status;
    }
    return {};
  }
  // Vectors are kept from product to product, so that their pages are touched once; an operator
  // therefore serves one solve at a time.
  Status reserve(std::int64_t count) const {
    if (count <= reserved_) return {};
    std::int64_t widest = 0;
    for (const Block<T>& block : blocks_)
      widest = std::max(widest, std::visit([](const auto& b) { return b.parameters(); }, block));
    in_outputs_ = allocate_scratch<T>(2 * outputs_ * count);
    in_parameters_ = allocate_scratch<T>(widest * count);
    reserved_ = in_outputs_ && in_parameters_ ? count : 0;
    if (reserved_ == 0 && count > 0)
      return {Code::out_of_memory, "no memory for a product with a Jacobian"};
    return {};
  }

  const Form form_;
  const std::vector<Block<T>> blocks_;
  const std::int64_t outputs_;  // N·K
  std::int64_t parameters_;
  const Operator* exact_;
  const int threads_;
  mutable Scratch<T> in_outputs_, in_parameters_;
  mutable std::int64_t reserved_ = 0;
};

// Keeps the arrays alive that the products read.
class JacobianOperator final : public Operator {
 public:
  // blocks: tuples (factors, row offsets or None, columns or None, bias), LiveFactors, or arrays
  // of rows (N, K, P). Products at full accuracy are left to `exact`, if given.
  JacobianOperator(const std::string& form, py::list blocks, std::int64_t outputs, py::object exact,
                   int threads)
      : blocks_(std::move(blocks)), exact_(std::move(exact)) {
    if (blocks_.empty()) throw py::value_error("argument 'blocks' must hold at least one block");
    const Array sample(sample_of(blocks_[0]), "blocks");
    dispatch_float(sample, [&]<class T>() {
      std::vector<Block<T>> read;
      for (const py::handle item : blocks_) read.push_back(read_block<T>(item, sample, outputs));
      operator_ = std::make_unique<Products<T>>(
          form_named(form), std::move(read), outputs,
          exact_.is_none() ? nullptr : exact_.cast<const Operator*>(), checked_threads(threads));
    });
  }
  std::int64_t rows() const override { return operator_->rows(); }
  std::int64_t columns() const override { return operator_->columns(); }
  double unit_roundoff(Accuracy accuracy) const override {
    return operator_->unit_roundoff(accuracy);
  }
  Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const override {
    return operator_->apply(x, y, count, accuracy);
  }
  Status apply_transposed(const double* x, double* y, std::int64_t count,
                          Accuracy accuracy) const override {
    return operator_->apply_transposed(x, y, count, accuracy);
  }

 private:
  static py::object sample_of(py::handle block) {
    if (py::isinstance<py::tuple>(block)) return block.cast<py::tuple>()[0].cast<py::tuple>()[0];
    if (py::isinstance<LiveFactors>(block)) return block.cast<const LiveFactors&>().activations;
    return py::reinterpret_borrow<py::object>(block);
  }
  template <class T>
  static Block<T> read_block(py::handle item, const Array& sample, std::int64_t outputs) {
    Block<T> block;
    std::int64_t rows = 0;
    if (py::isinstance<py::tuple>(item)) {
      const auto entry = item.cast<py::tuple>();
      const Factors factors(entry[0].cast<py::tuple>(), true);
      factors.activations.expect_like(sample);
      const auto layer =
          product_layer<T>(factors, entry[1], entry[2], entry[3].cast<bool>(), false);
      rows = layer.n * layer.k;
      block = layer;
    } else if (py::isinstance<LiveFactors>(item)) {
      const auto& layer = item.cast<const LiveFactors&>().of_type<T>();
      rows = layer.n * layer.k;
      block = GivenLive<T>{&layer};
    } else {
      const Array given(item, "rows");
      given.expect_cpu().expect_like(sample).expect_shape({Array::any, Array::any, Array::any});
      rows = given.shape(0) * given.shape(1);
      block = GivenRows<T>{rows, given.shape(2), given.contiguous_data<const T>()};
    }
    if (rows != outputs)
      throw py::value_error("argument 'blocks' must have " + std::to_string(outputs) +
                            " rows each, got " + std::to_string(rows));
    return block;
  }

  py::list blocks_;
  py::object exact_;
  std::unique_ptr<Operator> operator_;
};

}  // namespace

void bind_jacobian_operator(py::module_& m) {
  py::class_<JacobianOperator, Operator>(m, "JacobianOperator",
                                         "J, J Jᵀ or Jᵀ J of a Jacobian that is given as blocks.")
      .def(py::init<const std::string&, py::list, std::int64_t, py::object, int>(), py::arg("form"),
           py::arg("blocks"), py::arg("outputs"), py::arg("exact").none(true), py::arg("threads"));
}

}  // namespace jacpot
