// MINRES (Paige & Saunders 1975, SIAM J. Numer. Anal. 12): symmetric systems, indefinite ones too,
// by the Lanczos process; the residual never grows.
#include "krylov/refine.hpp"

namespace jacpot::krylov {
namespace {

class MinimalResidual {
 public:
  MinimalResidual(const Operator& a, double damping, const Control& control)
      : a_(a), damping_(damping), control_(control), shape_{a.rows(), 1, control.threads} {}

  Status allocate() {
    memory_ = allocate_scratch<double>(8 * shape_.size);
    partial_ = allocate_scratch<double>(shape_.chunks() + 1);
    if (!memory_ || !partial_)
      return {Code::out_of_memory, "no memory for the vectors of the solver"};
    double** const vectors[] = {&r_, &ar_, &before_, &v_, &y_, &w_, &w_before_, &correction_};
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
    if (const Status status = multiply(r_, ar_, Accuracy::full); !status.ok()) return status;
    normal_ = norm(ar_);
    if (norm_r_ > 0) norm_a_ = std::max(norm_a_, normal_ / norm_r_);
    return {};
  }

  Outcome verdict(const double* x) {
    const double unit = a_.unit_roundoff(Accuracy::full), hidden = unit * norm_a_ * norm(x);
    if (!std::isfinite(norm_r_) || !std::isfinite(normal_)) return Outcome::non_finite;
    if (norm_r_ + hidden <= control_.tolerance * norm_b_ || norm_r_ == 0) return Outcome::converged;
    // The operator takes what is left to zero: b has a part outside the range.
    if (normal_ <= std::sqrt(unit) * norm_a_ * norm_r_) return Outcome::inconsistent;
    return norm_r_ <= hidden ? Outcome::stagnated : Outcome::iteration_limit;
  }
  double measure() const { return norm_r_; }
  double residual_norm() const { return norm_r_; }

  Status correct(double* x) {
    double beta = norm_r_, beta_before = 0, dbar = 0, epsilon = 0, phibar = norm_r_;
    double c = -1, s = 0;
    std::copy(r_, r_ + shape_.size, y_);  // y is the next Lanczos vector before normalisation
    for (double* vector : {before_, w_, w_before_, correction_})
      std::fill(vector, vector + shape_.size, 0.0);
    const double reach = std::max(100 * a_.unit_roundoff(accuracy), 1e-14) * norm_r_;
    while (report.iterations < control_.max_iterations) {
      ++report.iterations;
      for (std::int64_t i = 0; i < shape_.size; ++i) v_[i] = y_[i] / beta;
      if (const Status status = multiply(v_, y_, accuracy); !status.ok()) return status;
      // before_ holds the normalised vector that came before v.
      const double alpha = dot(v_, y_);
      for (std::int64_t i = 0; i < shape_.size; ++i) {
        y_[i] -= alpha * v_[i] + (beta_before > 0 ? beta * before_[i] : 0.0);
        before_[i] = v_[i];
      }
      beta_before = beta;
      beta = norm(y_);
      if (!std::isfinite(alpha) || !std::isfinite(beta)) return {};
      norm_a_ = std::max(norm_a_, std::sqrt(alpha * alpha + beta * beta));

      const double epsilon_before = epsilon, delta = c * dbar + s * alpha;
      const double gbar = s * dbar - c * alpha;
      epsilon = s * beta;
      dbar = -c * beta;
      const double root = std::hypot(gbar, dbar);
      const double gamma = std::hypot(gbar, beta);
      if (gamma <= a_.unit_roundoff(accuracy) * norm_a_) break;  // singular along v
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
      interrupted = !control_.go_on(report.iterations, phibar / norm_b_);
      if (interrupted || phibar <= 0.5 * control_.tolerance * norm_b_ || phibar <= reach ||
          normal <= a_.unit_roundoff(accuracy) * norm_a_ * phibar ||
          beta <= a_.unit_roundoff(Accuracy::full) * norm_a_)
        break;
    }
    for (std::int64_t i = 0; i < shape_.size; ++i)
      if (!std::isfinite(correction_[i])) return {};
    for (std::int64_t i = 0; i < shape_.size; ++i) x[i] += correction_[i];
    return {};
  }

  Accuracy accuracy = Accuracy::working;
  bool interrupted = false;
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

  const Operator& a_;
  const double damping_;
  const Control& control_;
  const Shape shape_;
  Scratch<double> memory_, partial_;
  double *r_ = nullptr, *ar_ = nullptr, *before_ = nullptr, *v_ = nullptr, *y_ = nullptr,
         *w_ = nullptr, *w_before_ = nullptr, *correction_ = nullptr;
  double norm_a_ = 0, norm_b_ = 0, norm_r_ = 0, normal_ = 0;
};

}  // namespace

Status minres(const Operator& a, double damping, std::int64_t count, const double* b, double* x,
              const Control& control, double* residual_norms, Report* report) {
  return for_columns(a, count, b, x, residual_norms, report, control,
                     [&] { return MinimalResidual(a, damping, control); });
}

}  // namespace jacpot::krylov
