#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <exception>

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "krylov/dense_operator.hpp"
#include "krylov/solver.hpp"

namespace jacpot {
namespace {

using krylov::Accuracy;
using krylov::Operator;

// An exception of Python code that C++ solvers were calling; it travels as a failed Status.
constexpr Status raised{Code::interrupted, "a Python callback raised"};
thread_local std::exception_ptr pending;

void raise_pending_or(Status status, const char* operation) {
  if (std::exception_ptr error = std::exchange(pending, nullptr)) std::rethrow_exception(error);
  raise_if_failed(status, operation);
}

// Ctrl-C is no failure: the iterate that was reached is worth having.
bool interrupted_by_keyboard() {
  if (!pending) return false;
  try {
    std::rethrow_exception(pending);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_KeyboardInterrupt)) return false;
  } catch (...) {
    return false;
  }
  pending = nullptr;
  return true;
}

py::array_t<double> borrow(const double* data, std::int64_t rows, std::int64_t columns) {
  return py::array_t<double>({rows, columns}, data, py::capsule(data, [](void*) {}));
}

class Callback final : public Operator {
 public:
  Callback(std::int64_t rows, std::int64_t columns, py::object apply, py::object apply_transposed,
           double working, double full)
      : rows_(rows),
        columns_(columns),
        apply_(std::move(apply)),
        apply_transposed_(std::move(apply_transposed)),
        working_(working),
        full_(full) {}

  std::int64_t rows() const override { return rows_; }
  std::int64_t columns() const override { return columns_; }
  double unit_roundoff(Accuracy accuracy) const override {
    return accuracy == Accuracy::full ? full_ : working_;
  }
  Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const override {
    return call(apply_, x, columns_, y, rows_, count, accuracy);
  }
  Status apply_transposed(const double* x, double* y, std::int64_t count,
                          Accuracy accuracy) const override {
    return call(apply_transposed_, x, rows_, y, columns_, count, accuracy);
  }

 private:
  static Status call(const py::object& function, const double* x, std::int64_t in, double* y,
                     std::int64_t out, std::int64_t count, Accuracy accuracy) {
    const py::gil_scoped_acquire gil;
    try {
      function(borrow(x, in, count), borrow(y, out, count), accuracy == Accuracy::full);
      return {};
    } catch (...) {
      pending = std::current_exception();
      return raised;
    }
  }

  std::int64_t rows_, columns_;
  py::object apply_, apply_transposed_;
  double working_, full_;
};

// Keeps the array alive that the C++ operator reads.
class Dense final : public Operator {
 public:
  Dense(py::handle matrix, bool symmetric, int threads) : array_(matrix, "operator") {
    array_.expect_cpu().expect_shape({Array::any, Array::any});
    operator_ = dispatch_float(array_, [&]<class T>() {
      const auto view = array_.view<const T, 2>();
      if (view.stride[1] != 1 && view.shape[1] > 1) array_.expect_contiguous();
      if (symmetric && view.shape[0] != view.shape[1])
        throw py::value_error("argument 'operator' must be square to be symmetric, got shape " +
                              array_.shape_text());
      return krylov::dense_operator(view, symmetric, checked_threads(threads));
    });
  }
  std::int64_t rows() const override { return operator_->rows(); }
  std::int64_t columns() const override { return operator_->columns(); }
  double unit_roundoff(Accuracy accuracy) const override {
    return operator_->unit_roundoff(accuracy);
  }
  bool calls_out(std::int64_t count) const override { return operator_->calls_out(count); }
  Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const override {
    return operator_->apply(x, y, count, accuracy);
  }
  Status apply_transposed(const double* x, double* y, std::int64_t count,
                          Accuracy accuracy) const override {
    return operator_->apply_transposed(x, y, count, accuracy);
  }
  Status apply_both(const double* v, double alpha, double* u, double* w, double* spare,
                    Accuracy accuracy) const override {
    return operator_->apply_both(v, alpha, u, w, spare, accuracy);
  }

 private:
  Array array_;
  std::unique_ptr<Operator> operator_;
};

// Sees every iteration: keeps the history, calls back, and lets Ctrl-C through now and then.
class Monitor {
 public:
  explicit Monitor(py::object callback) : callback_(std::move(callback)) {}

  static bool observe(void* self, std::int64_t iteration, double residual) {
    return static_cast<Monitor*>(self)->observe(iteration, residual);
  }
  const std::vector<double>& history() const { return history_; }

 private:
  using Clock = std::chrono::steady_clock;

  bool observe(std::int64_t iteration, double residual) {
    history_.push_back(residual);
    const auto now = Clock::now();
    const bool due = now - signals_seen_ > std::chrono::milliseconds(50);
    if (!due && callback_.is_none()) return true;
    const py::gil_scoped_acquire gil;
    try {
      if (due && PyErr_CheckSignals() != 0) throw py::error_already_set();
      signals_seen_ = now;
      if (callback_.is_none()) return true;
      const double elapsed = std::chrono::duration<double>(now - start_).count();
      const py::object answer = callback_(iteration, residual, elapsed);
      return answer.is_none() || answer.cast<bool>();
    } catch (...) {
      pending = std::current_exception();
      return false;
    }
  }

  py::object callback_;
  std::vector<double> history_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point signals_seen_ = start_;
};

// out = A · x, or Aᵀ · x
void apply(const Operator& a, py::handle x, py::handle out, bool transposed, bool full) {
  const Array from(x, "x"), to(out, "out", Access::write);
  from.expect_cpu().expect_shape({transposed ? a.rows() : a.columns(), Array::any});
  to.expect_cpu().expect_shape({transposed ? a.columns() : a.rows(), from.shape(1)});
  const auto* x_data = from.contiguous_data<const double>();
  auto* out_data = to.contiguous_data<double>();
  const Accuracy accuracy = full ? Accuracy::full : Accuracy::working;
  Status status;
  {
    const py::gil_scoped_release release;
    status = transposed ? a.apply_transposed(x_data, out_data, from.shape(1), accuracy)
                        : a.apply(x_data, out_data, from.shape(1), accuracy);
  }
  raise_pending_or(status, "apply");
}

const char* outcome_name(krylov::Outcome outcome) {
  using krylov::Outcome;
  switch (outcome) {
    case Outcome::converged:
      return "converged";
    case Outcome::stagnated:
      return "stagnated";
    case Outcome::iteration_limit:
      return "iteration_limit";
    case Outcome::indefinite:
      return "indefinite";
    case Outcome::inconsistent:
      return "inconsistent";
    case Outcome::preconditioner:
      return "preconditioner";
    case Outcome::non_finite:
      return "non_finite";
    case Outcome::interrupted:
      return "interrupted";
  }
  return "unknown";
}

// The norms of b's columns, and the largest size of an element in x's, NaN where there is one.
void describe_columns(const double* b, std::int64_t rows, const double* x, std::int64_t columns,
                      std::vector<double>& norms, std::vector<double>& largest) {
  const std::size_t count = norms.size();
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::size_t c = 0; c < count; ++c, ++b) norms[c] += *b * *b;
  for (double& norm : norms) norm = std::sqrt(norm);
  for (std::int64_t i = 0; i < columns; ++i)
    for (std::size_t c = 0; c < count; ++c, ++x)
      if (const double size = std::abs(*x); !(size <= largest[c]) && !std::isnan(largest[c]))
        largest[c] = size;
}

py::dict solve(const std::string& method, const Operator& a, py::handle rhs, py::handle x,
               double damping, const Operator* inverse, double tolerance,
               std::int64_t max_iterations, int threads, py::object callback) {
  const Array b(rhs, "rhs"), out(x, "x", Access::write);
  b.expect_cpu().expect_shape({a.rows(), Array::any});
  out.expect_cpu().expect_shape({a.columns(), b.shape(1)});
  const auto* b_data = b.contiguous_data<const double>();
  auto* x_data = out.contiguous_data<double>();
  const std::int64_t count = b.shape(1);
  Monitor monitor(std::move(callback));
  const krylov::Control control{tolerance, max_iterations, checked_threads(threads),
                                &Monitor::observe, &monitor};
  krylov::Report report;
  std::vector<double> residual_norms(static_cast<std::size_t>(count), 0.0);
  Status status;
  {
    const py::gil_scoped_release release;
    if (method == "cg")
      status = krylov::cg(a, damping, inverse, count, b_data, x_data, control,
                          residual_norms.data(), &report);
    else if (method == "block_cg")
      status = krylov::block_cg(a, damping, inverse, count, b_data, x_data, control,
                                residual_norms.data(), &report);
    else if (method == "minres")
      status = krylov::minres(a, damping, inverse, count, b_data, x_data, control,
                              residual_norms.data(), &report);
    else if (method == "lsmr")
      status = krylov::lsmr(a, damping, inverse, count, b_data, x_data, control,
                            residual_norms.data(), &report);
    else
      status = {Code::invalid_argument, "unknown method"};
  }
  std::vector<double> rhs_norms(residual_norms.size(), 0.0), largest(residual_norms.size(), 0.0);
  describe_columns(b_data, a.rows(), x_data, a.columns(), rhs_norms, largest);
  py::dict result;
  result["rhs_norms"] = rhs_norms;
  result["largest"] = largest;
  result["history"] = monitor.history();
  result["iterations"] = monitor.history().size();
  if (interrupted_by_keyboard()) {
    result["outcome"] = "interrupted";
    return result;
  }
  raise_pending_or(status, "solve");
  result["outcome"] = outcome_name(report.outcome);
  result["iterations"] = report.iterations;
  result["products"] = report.products;
  result["residual_norms"] = residual_norms;
  return result;
}

}  // namespace

void bind_krylov(py::module_& m) {
  py::class_<Operator>(m, "Operator", "A matrix that the solvers know by its products.")
      .def_property_readonly("rows", &Operator::rows)
      .def_property_readonly("columns", &Operator::columns)
      .def("apply", &apply, py::arg("x"), py::arg("out"), py::arg("transposed"), py::arg("full"),
           "Multiplies x by the matrix or its transpose.");
  py::class_<Dense, Operator>(m, "DenseOperator", "A dense float32 or float64 matrix.")
      .def(py::init<py::handle, bool, int>(), py::arg("matrix"), py::arg("symmetric"),
           py::arg("threads"));
  py::class_<Callback, Operator>(
      m, "CallbackOperator", "Products by Python functions apply(x, out, full) on float64 arrays.")
      .def(py::init<std::int64_t, std::int64_t, py::object, py::object, double, double>(),
           py::arg("rows"), py::arg("columns"), py::arg("apply"), py::arg("apply_transposed"),
           py::arg("roundoff_working"), py::arg("roundoff_full"));
  m.def("krylov_solve", &solve, py::arg("method"), py::arg("operator"), py::arg("rhs"),
        py::arg("x"), py::arg("damping"), py::arg("inverse").none(true), py::arg("tolerance"),
        py::arg("max_iterations"), py::arg("threads"), py::arg("callback"),
        "Runs the named Krylov method in place on x; returns what happened.");
}

}  // namespace jacpot
