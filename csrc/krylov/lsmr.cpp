// LSMR (Fong & Saunders 2011, SIAM J. Sci. Comput. 33): least squares and minimum norm from the
// Golub-Kahan bidiagonalisation, without squaring the condition number. Damping is an identity
// stacked below A, so that a restart from the recomputed residual stays a problem of the same
// kind; restarts are what carries a float32 operator to float64 residuals.
//
// A preconditioner M ≈ (AᵀA + damping·I)⁻¹ enters as the inner product of the right vectors
// (Arioli & Orban 2013): p = Aᵀu - βp, v = Mp, α² = pᵀv. What is then small is ‖Aᵀr‖ in the norm of
// M; the plain one is followed by the ratio that the two had at the last restart.
#include <algorithm>
#include <cmath>

#include "krylov/refine.hpp"

namespace jacpot::krylov {
namespace {

class LeastSquares {
 public:
  LeastSquares(const Operator& a, double damping, const Operator* inverse, const Control& control)
      : a_(a),
        inverse_(inverse),
        control_(control),
        root_(std::sqrt(damping)),
        below_(damping > 0 ? a.columns() : 0),
        tall_{a.rows() + below_, 1, control.threads},
        wide_{a.columns(), 1, control.threads} {}

  Status allocate() {
    memory_ = allocate_scratch<double>(tall_.size + a_.rows() + 6 * wide_.size);
    partial_ = allocate_scratch<double>(std::max(tall_.chunks(), wide_.chunks()) + 1);
    if (!memory_ || !partial_)
      return {Code::out_of_memory, "no memory for the vectors of the solver"};
    u_ = memory_.get();
    spare_ = u_ + tall_.size;
    atu_ = spare_ + a_.rows();
    p_ = atu_ + wide_.size;
    v_ = inverse_ ? p_ + wide_.size : p_;
    h_ = v_ + wide_.size;
    hbar_ = h_ + wide_.size;
    correction_ = hbar_ + wide_.size;
    return {};
  }

  // u = [b; 0] - [A; root·I] x, p = [A; root·I]ᵀ u at full accuracy, and v = M p.
  Status residual(const double* b, const double* x) {
    std::copy(b, b + a_.rows(), u_);
    std::fill(u_ + a_.rows(), u_ + tall_.size, 0.0);
    if (const Status status = multiply(x, 1, p_, Accuracy::full); !status.ok()) return status;
    scale(tall_, u_, -1);
    scale(wide_, p_, -1);
    norm_b_ = norm({a_.rows(), 1, control_.threads}, b);
    norm_r_ = norm(tall_, u_);
    normal_ = norm(wide_, p_);
    if (norm_r_ > 0) norm_a_ = std::max(norm_a_, normal_ / norm_r_);
    return precondition(&measure_);
  }

  Outcome verdict(const double* x) {
    const double hidden = a_.unit_roundoff(Accuracy::full) * norm_a_ * norm(wide_, x);
    if (!std::isfinite(norm_r_) || !std::isfinite(normal_)) return Outcome::non_finite;
    if (norm_r_ + hidden <= control_.tolerance * norm_b_ || norm_r_ == 0 || normal_ == 0)
      return Outcome::converged;
    if (normal_ + norm_a_ * hidden <= control_.tolerance * norm_a_ * norm_r_)
      return Outcome::converged;
    return Outcome::iteration_limit;
  }
  double measure() const { return measure_; }
  double residual_norm() const { return norm_r_; }

  Status correct(double* x) { return bidiagonalise(x); }

  Accuracy accuracy = Accuracy::working;
  Outcome stop = Outcome::iteration_limit;
  Report report;

 private:
  double norm(const Shape& shape, const double* x) {
    double out = 0;
    dots(shape, x, x, partial_.get(), &out);
    return std::sqrt(out);
  }
  // u = [A; root·I] v - alpha·u and w = [A; root·I]ᵀ u
  Status multiply(const double* v, double alpha, double* w, Accuracy how) {
    report.products += 2;
    const Status status = a_.apply_both(v, alpha, u_, w, spare_, how);
    double* below = u_ + a_.rows();
    for (std::int64_t i = 0; i < below_; ++i) {
      below[i] = root_ * v[i] - alpha * below[i];
      w[i] += root_ * below[i];
    }
    return status;
  }
  // v = M p, and the length √(pᵀv) that p has for it.
  Status precondition(double* length) {
    if (!inverse_) {
      *length = norm(wide_, p_);
      return {};
    }
    const Status status = inverse_->apply(p_, v_, 1, Accuracy::working);
    double square = 0;
    dots(wide_, p_, v_, partial_.get(), &square);
    if (!std::isfinite(square))
      stop = Outcome::non_finite;
    else if (square <= 0 && norm(wide_, p_) > 0)
      stop = Outcome::preconditioner;
    *length = std::sqrt(std::max(square, 0.0));
    return status;
  }

  Status bidiagonalise(double* x) {
    double beta = norm_r_, alpha = measure_ / norm_r_;
    scale(tall_, u_, 1 / beta);
    scale_right(1 / measure_);
    std::copy(v_, v_ + wide_.size, h_);
    std::fill(hbar_, hbar_ + wide_.size, 0.0);
    std::fill(correction_, correction_ + wide_.size, 0.0);
    double zetabar = alpha * beta, alphabar = alpha, rho = 1, rhobar = 1, cbar = 1, sbar = 0;
    double betadd = beta, betad = 0, rhod = 1, tautilde = 0, thetatilde = 0, zeta = 0;
    // Beyond this reduction the rounding of the working products takes over.
    const double reach = std::max(100 * a_.unit_roundoff(accuracy), 1e-14);
    const double start_normal = measure_, start_r = norm_r_, plain = normal_ / measure_;
    // With a preconditioner the plain norm is an estimate: too short a cycle would be in vain.
    const double least = inverse_ ? 0.1 * start_normal : INFINITY;
    while (report.iterations < control_.max_iterations) {
      ++report.iterations;
      const double length = inverse_ ? norm(wide_, v_) : 1, alpha_before = alpha;
      if (const Status status = multiply(v_, alpha, atu_, accuracy); !status.ok()) return status;
      beta = norm(tall_, u_);
      const double shrink = beta > 0 ? 1 / beta : 0, minus = -beta;
      scale(tall_, u_, shrink);
      combine(wide_, &shrink, atu_, &minus, p_);
      if (const Status status = precondition(&alpha); !status.ok()) return status;
      if (!std::isfinite(alpha) || !std::isfinite(beta) || stop != Outcome::iteration_limit) break;
      if (alpha > 0) scale_right(1 / alpha);
      norm_a_ = std::max(norm_a_, std::hypot(alpha_before, beta) / length);

      const double rho_old = rho, rhobar_old = rhobar, zeta_old = zeta;
      rho = std::hypot(alphabar, beta);
      const double c = alphabar / rho, s = beta / rho, theta = s * alpha;
      alphabar = c * alpha;
      const double thetabar = sbar * rho;
      rhobar = std::hypot(cbar * rho, theta);
      cbar = cbar * rho / rhobar;
      sbar = theta / rhobar;
      zeta = cbar * zetabar;
      zetabar = -sbar * zetabar;
      update(thetabar * rho / (rho_old * rhobar_old), zeta / (rho * rhobar), theta / rho);

      const double betahat = c * betadd;
      betadd = -s * betadd;
      const double thetatilde_old = thetatilde, rhotilde = std::hypot(rhod, thetabar);
      const double ctilde = rhod / rhotilde, stilde = thetabar / rhotilde;
      thetatilde = stilde * rhobar;
      rhod = ctilde * rhobar;
      betad = -stilde * betad + ctilde * betahat;
      tautilde = (zeta_old - thetatilde_old * tautilde) / rhotilde;
      const double taud = (zeta - thetatilde * tautilde) / rhod;
      const double norm_r = std::hypot(betad - taud, betadd), normal = std::abs(zetabar);
      const double relative = plain * normal / (norm_a_ * norm_r);

      if (!control_.go_on(report.iterations, std::min(norm_r / norm_b_, relative)))
        stop = Outcome::interrupted;
      if (stop != Outcome::iteration_limit || alpha == 0 || beta == 0) break;
      // A little below the target, so that the recomputed residual passes.
      if (norm_r <= 0.5 * control_.tolerance * norm_b_ ||
          (relative <= 0.5 * control_.tolerance && normal <= least) ||
          normal <= reach * start_normal || norm_r <= reach * start_r)
        break;
    }
    for (std::int64_t i = 0; i < wide_.size; ++i)
      if (!std::isfinite(correction_[i])) return {};
    for (std::int64_t i = 0; i < wide_.size; ++i) x[i] += correction_[i];
    return {};
  }

  static void scale(const Shape& shape, double* x, double factor) {
    for (std::int64_t i = 0; i < shape.size; ++i) x[i] *= factor;
  }
  void scale_right(double factor) {
    scale(wide_, p_, factor);
    if (inverse_) scale(wide_, v_, factor);
  }
  void update(double of_hbar, double step, double of_h) {
    wide_.for_chunks([&](std::int64_t begin, std::int64_t end, std::int64_t) {
      for (std::int64_t i = begin; i < end; ++i) {
        hbar_[i] = h_[i] - of_hbar * hbar_[i];
        correction_[i] += step * hbar_[i];
        h_[i] = v_[i] - of_h * h_[i];
      }
    });
  }

  const Operator& a_;
  const Operator* inverse_;
  const Control& control_;
  const double root_;
  const std::int64_t below_;
  const Shape tall_, wide_;
  Scratch<double> memory_, partial_;
  double *u_ = nullptr, *spare_ = nullptr, *atu_ = nullptr, *p_ = nullptr, *v_ = nullptr,
         *h_ = nullptr, *hbar_ = nullptr, *correction_ = nullptr;
  double norm_a_ = 0, norm_b_ = 0, norm_r_ = 0;
  double normal_ = 0, measure_ = 0;  // ‖Aᵀr‖, plain and in the norm of M
};

}  // namespace

Status lsmr(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
            const double* b, double* x, const Control& control, double* residual_norms,
            Report* report) {
  return for_columns(a, inverse, count, b, x, residual_norms, report, control,
                     [&] { return LeastSquares(a, damping, inverse, control); });
}

}  // namespace jacpot::krylov
