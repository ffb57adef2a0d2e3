// MINRES (Paige & Saunders 1975, SIAM J. Numer. Anal. 12): symmetric systems, indefinite ones too,
// by the Lanczos process; the residual never grows, in the norm of the preconditioner M. There the
// process is p' = A v - alpha·p - beta·p_before, v = M p / beta, beta² = pᵀMp. As in lsmr.cpp the
// plain norm of the residual is followed by the ratio that the two had at the last restart.
#include "krylov/refine.hpp"

namespace jacpot::krylov {
namespace {

class MinimalResidual {
 public:
  MinimalResidual(const Operator& a, double damping, const Operator* inverse,
                  const Control& control)
      : a_(a),
        damping_(damping),
        inverse_(inverse),
        control_(control),
        shape_{a.rows(), 1, control.threads} {}

  Status allocate() {
    memory_ = allocate_scratch<double>(9 * shape_.size);
    partial_ = allocate_scratch<double>(shape_.chunks() + 1);
    if (!memory_ || !partial_)
      return {Code::out_of_memory, "no memory for the vectors of the solver"};
    double** const vectors[] = {&r_, &z_, &v_, &y_, &p_, &before_, &w_, &w_before_, &correction_};
    double* next = memory_.get();
    for (double** vector : vectors) {
      *vector = next;
      next += shape_.size;
    }
    return {};
  }

  Status residual(const double* b, const double* x) {
    if (const Status status = multiply(x, r_, Accuracy::full); !status.ok()) return status;
    for (std::int64_t i = 0; i < shape_.size; ++i) r_[i] = b[i] - r_[i];
    norm_b_ = norm(b);
    norm_r_ = norm(r_);
    if (const Status status = precondition(r_, &measure_); !status.ok()) return status;
    if (const Status status = multiply(z(r_), y_, Accuracy::full); !status.ok()) return status;
    const double norm_z = norm(z(r_)), normal = norm(y_);
    if (norm_z > 0) norm_a_ = std::max(norm_a_, normal / norm_z);
    in_null_space_ =
        norm_z > 0 && normal <= std::sqrt(a_.unit_roundoff(Accuracy::full)) * norm_a_ * norm_z;
    finite_ = std::isfinite(norm_r_) && std::isfinite(normal);
    return {};
  }

  Outcome verdict(const double* x) {
    const double unit = a_.unit_roundoff(Accuracy::full), hidden = unit * norm_a_ * norm(x);
    if (!finite_) return Outcome::non_finite;
    if (norm_r_ + hidden <= control_.tolerance * norm_b_ || norm_r_ == 0) return Outcome::converged;
    // The operator takes what is left to zero: b has a part outside the range.
    if (in_null_space_) return Outcome::inconsistent;
    return norm_r_ <= hidden ? Outcome::stagnated : Outcome::iteration_limit;
  }
  double measure() const { return measure_; }
  double residual_norm() const { return norm_r_; }

  Status correct(double* x) {
    double beta = measure_, beta_before = 0, dbar = 0, epsilon = 0, phibar = measure_;
    double c = -1, s = 0;
    double largest = 0;                   // of the tridiagonal matrix
    std::copy(r_, r_ + shape_.size, y_);  // y is the next Lanczos vector before normalisation
    for (double* vector : {p_, w_, w_before_, correction_})
      std::fill(vector, vector + shape_.size, 0.0);
    const double reach = std::max(100 * a_.unit_roundoff(accuracy), 1e-14) * measure_;
    const double plain = norm_r_ / measure_;
    // With a preconditioner the plain norm is an estimate: too short a cycle would be in vain.
    const double least = inverse_ ? 0.1 * measure_ : INFINITY;
    while (report.iterations < control_.max_iterations) {
      ++report.iterations;
      std::swap(before_, p_);
      for (std::int64_t i = 0; i < shape_.size; ++i) {
        v_[i] = z(y_)[i] / beta;
        p_[i] = y_[i] / beta;
      }
      if (const Status status = multiply(v_, y_, accuracy); !status.ok()) return status;
      const double alpha = dot(v_, y_);
      norm_a_ = std::max(norm_a_, norm(y_) / norm(v_));
      for (std::int64_t i = 0; i < shape_.size; ++i)
        y_[i] -= alpha * p_[i] + (beta_before > 0 ? beta * before_[i] : 0.0);
      beta_before = beta;
      if (const Status status = precondition(y_, &beta); !status.ok()) return status;
      if (!std::isfinite(alpha) || !std::isfinite(beta) || stop != Outcome::iteration_limit) break;
      largest = std::max(largest, std::hypot(alpha, beta));

      const double epsilon_before = epsilon, delta = c * dbar + s * alpha;
      const double gbar = s * dbar - c * alpha;
      epsilon = s * beta;
      dbar = -c * beta;
      const double root = std::hypot(gbar, dbar);
      const double gamma = std::hypot(gbar, beta);
      if (gamma <= a_.unit_roundoff(accuracy) * largest) break;  // singular along v
      c = gbar / gamma;
      s = beta / gamma;
      const double phi = c * phibar, normal = phibar * root;
      phibar *= s;
      for (std::int64_t i = 0; i < shape_.size; ++i) {
        const double next = (v_[i] - epsilon_before * w_before_[i] - delta * w_[i]) / gamma;
        w_before_[i] = w_[i];
        w_[i] = next;
        correction_[i] += phi * next;
      }
      const double relative = plain * phibar / norm_b_;
      if (!control_.go_on(report.iterations, relative)) stop = Outcome::interrupted;
      if (stop != Outcome::iteration_limit || phibar <= reach ||
          (relative <= 0.5 * control_.tolerance && phibar <= least) ||
          normal <= a_.unit_roundoff(accuracy) * largest * phibar ||
          beta <= a_.unit_roundoff(Accuracy::full) * largest)
        break;
    }
    for (std::int64_t i = 0; i < shape_.size; ++i)
      if (!std::isfinite(correction_[i])) return {};
    for (std::int64_t i = 0; i < shape_.size; ++i) x[i] += correction_[i];
    return {};
  }

  Accuracy accuracy = Accuracy::working;
  Outcome stop = Outcome::iteration_limit;
  Report report;

 private:
  double dot(const double* x, const double* y) {
    double out = 0;
    dots(shape_, x, y, partial_.get(), &out);
    return out;
  }
  double norm(const double* x) { return std::sqrt(dot(x, x)); }
  Status multiply(const double* in, double* out, Accuracy how) {
    ++report.products;
    const Status status = a_.apply(in, out, 1, how);
    for (std::int64_t i = 0; i < shape_.size; ++i) out[i] += damping_ * in[i];
    return status;
  }

  // z = M y, where there is an M, and the length √(yᵀMy) that y has for it.
  Status precondition(const double* y, double* length) {
    const Status status = inverse_ ? inverse_->apply(y, z_, 1, Accuracy::working) : Status{};
    const double square = dot(y, z(y));
    if (!std::isfinite(square))
      stop = Outcome::non_finite;
    else if (square <= 0 && norm(y) > 0)
      stop = Outcome::preconditioner;
    *length = std::sqrt(std::max(square, 0.0));
    return status;
  }
  const double* z(const double* y) const { return inverse_ ? z_ : y; }

  const Operator& a_;
  const double damping_;
  const Operator* inverse_;
  const Control& control_;
  const Shape shape_;
  Scratch<double> memory_, partial_;
  double *r_ = nullptr, *z_ = nullptr, *v_ = nullptr, *y_ = nullptr, *p_ = nullptr,
         *before_ = nullptr, *w_ = nullptr, *w_before_ = nullptr, *correction_ = nullptr;
  double norm_a_ = 0, norm_b_ = 0, norm_r_ = 0;
  double measure_ = 0;                          // the norm of the residual for M
  bool finite_ = true, in_null_space_ = false;  // of the residual
};

}  // namespace

Status minres(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
              const double* b, double* x, const Control& control, double* residual_norms,
              Report* report) {
  return for_columns(a, inverse, count, b, x, residual_norms, report, control,
                     [&] { return MinimalResidual(a, damping, inverse, control); });
}

}  // namespace jacpot::krylov
