// LSMR (Fong & Saunders 2011, SIAM J. Sci. Comput. 33): least squares and minimum norm from the
// Golub-Kahan bidiagonalisation, without squaring the condition number. Damping is an identity
// stacked below A, so that a restart from the recomputed residual stays a problem of the same
// kind; restarts are what carries a float32 operator to float64 residuals.
#include <algorithm>
#include <cmath>

#include "krylov/refine.hpp"

namespace jacpot::krylov {
namespace {

class LeastSquares {
 public:
  LeastSquares(const Operator& a, double damping, const Control& control)
      : a_(a),
        control_(control),
        root_(std::sqrt(damping)),
        below_(damping > 0 ? a.columns() : 0),
        tall_{a.rows() + below_, 1, control.threads},
        wide_{a.columns(), 1, control.threads} {}

  Status allocate() {
    memory_ = allocate_scratch<double>(2 * tall_.size + 5 * wide_.size);
    partial_ = allocate_scratch<double>(std::max(tall_.chunks(), wide_.chunks()) + 1);
    if (!memory_ || !partial_)
      return {Code::out_of_memory, "no memory for the vectors of the solver"};
    u_ = memory_.get();
    au_ = u_ + tall_.size;
    v_ = au_ + tall_.size;
    atv_ = v_ + wide_.size;
    h_ = atv_ + wide_.size;
    hbar_ = h_ + wide_.size;
    correction_ = hbar_ + wide_.size;
    return {};
  }

  // u = [b; 0] - [A; root·I] x and v = [A; root·I]ᵀ u, at full accuracy.
  Status residual(const double* b, const double* x) {
    if (const Status status = multiply(x, u_, Accuracy::full); !status.ok()) return status;
    for (std::int64_t i = 0; i < a_.rows(); ++i) u_[i] = b[i] - u_[i];
    for (std::int64_t i = a_.rows(); i < tall_.size; ++i) u_[i] = -u_[i];
    if (const Status status = multiply_transposed(u_, v_, Accuracy::full); !status.ok())
      return status;
    norm_b_ = norm({a_.rows(), 1, control_.threads}, b);
    norm_r_ = norm(tall_, u_);
    normal_ = norm(wide_, v_);
    if (norm_r_ > 0) norm_a_ = std::max(norm_a_, normal_ / norm_r_);
    return {};
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
  double measure() const { return normal_; }
  double residual_norm() const { return norm_r_; }

  Status correct(double* x) { return bidiagonalise(x); }

  Accuracy accuracy = Accuracy::working;
  bool interrupted = false;
  Report report;

 private:
  double norm(const Shape& shape, const double* x) {
    double out = 0;
    dots(shape, x, x, partial_.get(), &out);
    return std::sqrt(out);
  }
  Status multiply(const double* in, double* out, Accuracy how) {
    ++report.products;
    const Status status = a_.apply(in, out, 1, how);
    for (std::int64_t i = 0; i < below_; ++i) out[a_.rows() + i] = root_ * in[i];
    return status;
  }
  Status multiply_transposed(const double* in, double* out, Accuracy how) {
    ++report.products;
    const Status status = a_.apply_transposed(in, out, 1, how);
    for (std::int64_t i = 0; i < below_; ++i) out[i] += root_ * in[a_.rows() + i];
    return status;
  }

  Status bidiagonalise(double* x) {
    double beta = norm_r_, alpha = normal_ / norm_r_;
    scale(tall_, u_, 1 / beta);
    scale(wide_, v_, 1 / normal_);
    std::copy(v_, v_ + wide_.size, h_);
    std::fill(hbar_, hbar_ + wide_.size, 0.0);
    std::fill(correction_, correction_ + wide_.size, 0.0);
    double zetabar = alpha * beta, alphabar = alpha, rho = 1, rhobar = 1, cbar = 1, sbar = 0;
    double betadd = beta, betad = 0, rhod = 1, tautilde = 0, thetatilde = 0, zeta = 0;
    // Beyond this reduction the rounding of the working products takes over.
    const double reach = std::max(100 * a_.unit_roundoff(accuracy), 1e-14);
    const double start_normal = normal_, start_r = norm_r_;
    while (report.iterations < control_.max_iterations) {
      ++report.iterations;
      if (const Status status = multiply(v_, au_, accuracy); !status.ok()) return status;
      advance(tall_, au_, u_, alpha, &beta);
      if (const Status status = multiply_transposed(u_, atv_, accuracy); !status.ok())
        return status;
      advance(wide_, atv_, v_, beta, &alpha);
      if (!std::isfinite(alpha) || !std::isfinite(beta)) return {};
      norm_a_ = std::max(norm_a_, std::hypot(alpha, beta));

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

      interrupted = !control_.go_on(report.iterations,
                                    std::min(norm_r / norm_b_, normal / (norm_a_ * norm_r)));
      if (interrupted || alpha == 0 || beta == 0) break;
      // A little below the target, so that the recomputed residual passes.
      if (norm_r <= 0.5 * control_.tolerance * norm_b_ ||
          normal <= 0.5 * control_.tolerance * norm_a_ * norm_r || normal <= reach * start_normal ||
          norm_r <= reach * start_r)
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
  // x = (product - coefficient · x) / norm, and the norm
  void advance(const Shape& shape, const double* product, double* x, double coefficient,
               double* length) {
    const double minus = -coefficient, one = 1;
    combine(shape, &one, product, &minus, x);
    *length = norm(shape, x);
    if (*length > 0) scale(shape, x, 1 / *length);
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
  const Control& control_;
  const double root_;
  const std::int64_t below_;
  const Shape tall_, wide_;
  Scratch<double> memory_, partial_;
  double *u_ = nullptr, *au_ = nullptr, *v_ = nullptr, *atv_ = nullptr, *h_ = nullptr,
         *hbar_ = nullptr, *correction_ = nullptr;
  double norm_a_ = 0, norm_b_ = 0, norm_r_ = 0, normal_ = 0;
};

}  // namespace

Status lsmr(const Operator& a, double damping, std::int64_t count, const double* b, double* x,
            const Control& control, double* residual_norms, Report* report) {
  return for_columns(a, count, b, x, residual_norms, report, control,
                     [&] { return LeastSquares(a, damping, control); });
}

}  // namespace jacpot::krylov
