// Block conjugate gradients (O'Leary 1980) in Dubrulle's stable form, BCGrQ (2001): residuals are
// kept as R = Q·C with Q orthonormal in the preconditioner's inner product, so that dependent
// right-hand sides, and residuals that become dependent on the way, only make the block narrower.
// All right-hand sides share one search space, which saves iterations as well as passes over A.
// As in cg.cpp, the residual is recomputed at full accuracy before rounding in the working products
// could matter, and the search directions are kept.
#include "common/blas.hpp"
#include "krylov/small_matrix.hpp"
#include "krylov/solver.hpp"
#include "krylov/vectors.hpp"

namespace jacpot::krylov {
namespace {

constexpr double gap_share = 0.1;
constexpr double dependent = 1e-14;  // share of a column's square that counts as nothing new
constexpr int patience = 3;

class BlockConjugateGradients {
 public:
  BlockConjugateGradients(const Operator& a, double damping, const Operator* inverse,
                          std::int64_t count, const double* b, double* x, const Control& control)
      : a_(a),
        damping_(damping),
        inverse_(inverse),
        b_(b),
        x_(x),
        control_(control),
        n_(a.rows()),
        count_(count),
        norm_b_(count_),
        norm_r_(count_),
        gap_(count_),
        best_(count_) {}

  Status run(double* residual_norms, Report* report) {
    const Shape shape = block(count_);
    memory_ = allocate_scratch<double>(6 * n_ * count_);
    partial_ = allocate_scratch<double>((shape.chunks() + 1) * count_);
    if (!memory_ || !partial_)
      return {Code::out_of_memory, "no memory for the vectors of the solver"};
    double* next = memory_.get();
    for (double** v : {&r_, &q_, &z_, &s_, &as_, &spare_}) {
      *v = next;
      next += n_ * count_;
    }
    norms(b_, norm_b_);
    Status status = restart();
    while (status.ok() && !done_ && report_.iterations < control_.max_iterations)
      status = iterate();
    // Nothing is claimed but of a residual recomputed from the final x.
    if (status.ok() && !recomputed_) {
      status = recompute();
      if (status.ok() && meets_all(true)) report_.outcome = Outcome::converged;
    }
    std::copy(norm_r_.begin(), norm_r_.end(), residual_norms);
    *report = report_;
    return status;
  }

 private:
  using Norms = std::vector<double>;

  Shape block(std::int64_t columns) const { return {n_, columns, control_.threads}; }
  void norms(const double* v, Norms& out) {
    dots(block(count_), v, v, partial_.get(), out.data());
    for (double& value : out) value = std::sqrt(value);
  }
  bool meets_all(bool with_rounding) const {
    for (std::int64_t c = 0; c < count_; ++c) {
      const auto i = static_cast<std::size_t>(c);
      if (!(norm_r_[i] + (with_rounding ? rounding_[i] : 0) <= control_.tolerance * norm_b_[i]) &&
          norm_r_[i] != 0)
        return false;
    }
    return true;
  }
  void finish(Outcome outcome) {
    report_.outcome = outcome;
    done_ = true;
  }

  Status apply(const double* in, double* out, std::int64_t columns, Accuracy how) {
    ++report_.products;
    const Status status = a_.apply(in, out, columns, how);
    if (status.ok() && damping_ != 0)
      for (std::int64_t i = 0; i < n_ * columns; ++i) out[i] += damping_ * in[i];
    return status;
  }
  // left (n, l)ᵀ · right (n, m)
  Status gram(const double* left, std::int64_t l, const double* right, std::int64_t m,
              SmallMatrix& out) {
    out = SmallMatrix(l, m);
    if (n_ == 0) return {};
    return blas::gemm(true, false, l, m, n_, 1.0, left, l, right, m, 0.0, out.data.data(), m);
  }
  // out (n, m) = v (n, k) · c (k, m) + beta · out
  Status combine_columns(const double* v, const SmallMatrix& c, double beta, double* out) {
    if (c.rows == 0) {
      if (beta == 0) std::fill(out, out + n_ * c.columns, 0.0);
      return {};
    }
    return blas::gemm(false, false, n_, c.columns, c.rows, 1.0, v, c.rows, c.data.data(), c.columns,
                      beta, out, c.columns);
  }
  // v (n, k) = v · c (k, m)
  Status transform(double*& v, const SmallMatrix& c) {
    const Status status = combine_columns(v, c, 0.0, spare_);
    std::swap(v, spare_);
    return status;
  }

  // r = b - (A + damping·I) x at full accuracy.
  Status recompute() {
    if (const Status status = apply(x_, r_, count_, Accuracy::full); !status.ok()) return status;
    for (std::int64_t i = 0; i < n_ * count_; ++i) r_[i] = b_[i] - r_[i];
    norms(r_, norm_r_);
    Norms norm_x(norm_r_.size());
    norms(x_, norm_x);
    rounding_.assign(norm_r_.size(), 0.0);
    for (std::size_t c = 0; c < norm_x.size(); ++c)
      rounding_[c] = a_.unit_roundoff(Accuracy::full) * (norm_a_ + damping_) * norm_x[c];
    std::fill(gap_.begin(), gap_.end(), 0.0);
    recomputed_ = true;
    return {};
  }

  // From the recomputed residual: verdict, new Q and C, and directions conjugate to the last ones.
  Status restart() {
    Status status = recompute();
    if (!status.ok()) return status;
    bool finite = true, progress = report_.iterations == 0;
    for (std::size_t c = 0; c < norm_r_.size(); ++c) {
      finite &= std::isfinite(norm_r_[c]);
      progress |= norm_r_[c] < 0.7 * best_[c];
      best_[c] = report_.iterations == 0 ? norm_r_[c] : std::min(best_[c], norm_r_[c]);
    }
    if (!finite)
      finish(Outcome::non_finite);
    else if (meets_all(true))
      finish(Outcome::converged);
    idle_ = progress ? 0 : idle_ + 1;
    if (!done_ && idle_ >= patience) finish(Outcome::stagnated);
    if (done_) return {};
    // Unit columns: small and large residuals count alike in what is dependent.
    coefficients_ = SmallMatrix(count_, count_);
    for (std::int64_t i = 0; i < n_; ++i)
      for (std::int64_t c = 0; c < count_; ++c) {
        const double norm = norm_r_[static_cast<std::size_t>(c)];
        q_[i * count_ + c] = norm > 0 ? r_[i * count_ + c] / norm : 0.0;
      }
    for (std::int64_t c = 0; c < count_; ++c)
      coefficients_(c, c) = norm_r_[static_cast<std::size_t>(c)];
    const std::int64_t before = width_;
    width_ = count_;
    if (status = orthonormalise_residual(); !status.ok() || done_) return status;
    return next_directions(before);
  }

  // z = M q, and both turned so that qᵀz = I; twice, for orthogonality to rounding.
  Status orthonormalise_residual() {
    if (inverse_) {
      const Status status = inverse_->apply(q_, z_, width_, Accuracy::working);
      if (!status.ok()) return status;
    } else {
      std::copy(q_, q_ + n_ * width_, z_);
    }
    for (int pass = 0; pass < 2; ++pass) {
      SmallMatrix h;
      Status status = gram(q_, width_, z_, width_, h);
      for (std::int64_t i = 0; i < width_; ++i) {
        if (!std::isfinite(h(i, i))) finish(Outcome::non_finite);
        if (h(i, i) < 0) finish(Outcome::preconditioner);
        for (std::int64_t j = 0; j < i; ++j) h(i, j) = h(j, i) = 0.5 * (h(i, j) + h(j, i));
      }
      if (done_) return {};
      const Orthonormal turned = orthonormalise(h, dependent);
      if (status.ok()) status = transform(q_, turned.t);
      if (status.ok()) status = transform(z_, turned.t);
      if (!status.ok()) return status;
      coefficients_ = turned.zeta * coefficients_;
      width_ = turned.t.columns;
    }
    if (width_ == 0) finish(Outcome::stagnated);
    return {};
  }

  // s = z - s·K⁻¹(Asᵀz), conjugate to the `before` directions in s.
  Status next_directions(std::int64_t before) {
    if (before == 0) {
      std::copy(z_, z_ + n_ * width_, s_);
      return {};
    }
    SmallMatrix back;
    Status status = gram(as_, before, z_, width_, back);
    cholesky_solve(curvature_, back);
    for (double& value : back.data) value = -value;
    std::copy(z_, z_ + n_ * width_, spare_);
    if (status.ok()) status = combine_columns(s_, back, 1.0, spare_);
    std::swap(s_, spare_);
    return status;
  }

  Status iterate() {
    ++report_.iterations;
    const std::int64_t s = width_;
    Status status = apply(s_, as_, s, accuracy_);
    if (status.ok()) status = gram(s_, s, as_, s, curvature_);
    SmallMatrix step, squares;
    if (status.ok()) status = gram(s_, s, q_, s, step);
    if (status.ok()) status = gram(s_, s, s_, s, squares);
    if (!status.ok()) return status;
    for (std::int64_t i = 0; i < s; ++i) {
      if (!std::isfinite(curvature_(i, i))) finish(Outcome::non_finite);
      norm_a_ = std::max(norm_a_, std::abs(curvature_(i, i)) / squares(i, i) - damping_);
      for (std::int64_t j = 0; j < i; ++j)
        curvature_(i, j) = curvature_(j, i) = 0.5 * (curvature_(i, j) + curvature_(j, i));
    }
    if (done_) return {};
    if (!cholesky(curvature_)) {
      if (accuracy_ == Accuracy::working) {
        accuracy_ = Accuracy::full;
        width_ = 0;
        return restart();
      }
      finish(Outcome::indefinite);
      return {};
    }
    cholesky_solve(curvature_, step);
    const SmallMatrix change = step * coefficients_;
    recomputed_ = false;
    status = combine_columns(s_, change, 1.0, x_);
    for (double& value : step.data) value = -value;
    if (status.ok()) status = combine_columns(as_, step, 1.0, q_);
    if (status.ok()) status = orthonormalise_residual();
    if (!status.ok() || done_) return status;
    SmallMatrix inner;
    if (status = gram(q_, width_, q_, width_, inner); !status.ok()) return status;
    const SmallMatrix half = inner * coefficients_, moved = squares * change;
    const double unit = a_.unit_roundoff(accuracy_) * (norm_a_ + damping_);
    double worst = 0;
    bool due = true, rough = false;
    for (std::int64_t c = 0; c < count_; ++c) {
      double square = 0, length = 0;
      for (std::int64_t i = 0; i < width_; ++i) square += coefficients_(i, c) * half(i, c);
      for (std::int64_t i = 0; i < s; ++i) length += change(i, c) * moved(i, c);
      const auto at = static_cast<std::size_t>(c);
      norm_r_[at] = std::sqrt(std::max(square, 0.0));
      gap_[at] += unit * unit * std::max(length, 0.0);
      if (norm_b_[at] > 0) worst = std::max(worst, norm_r_[at] / norm_b_[at]);
      const double target = control_.tolerance * norm_b_[at];
      due &= norm_r_[at] <= target;
      rough |= std::sqrt(gap_[at]) > gap_share * std::max(norm_r_[at], 0.1 * target);
    }
    if (!control_.go_on(report_.iterations, worst)) {
      finish(Outcome::interrupted);
      return {};
    }
    if (due || rough) {
      replacements_ += 1;
      if (4 * replacements_ > report_.iterations + 16) accuracy_ = Accuracy::full;
      width_ = s;  // of the directions that the next ones are to be conjugate to
      return restart();
    }
    return next_directions(s);
  }

  const Operator& a_;
  const double damping_;
  const Operator* inverse_;
  const double* b_;
  double* x_;
  const Control& control_;
  const std::int64_t n_, count_;
  std::int64_t width_ = 0;  // of Q, Z and S; at most count_
  std::int64_t replacements_ = 0;
  Norms norm_b_, norm_r_, gap_, best_, rounding_;
  Scratch<double> memory_, partial_;
  double *r_ = nullptr, *q_ = nullptr, *z_ = nullptr, *s_ = nullptr, *as_ = nullptr,
         *spare_ = nullptr;
  SmallMatrix coefficients_;  // C (width, count)
  SmallMatrix curvature_;     // Cholesky factor of Sᵀ A S
  Accuracy accuracy_ = Accuracy::working;
  double norm_a_ = 0;
  int idle_ = 0;
  bool done_ = false, recomputed_ = false;
  Report report_;
};

}  // namespace

Status block_cg(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
                const double* b, double* x, const Control& control, double* residual_norms,
                Report* report) {
  if (count == 0 || a.rows() == 0) {
    report->outcome = Outcome::converged;
    return {};
  }
  return BlockConjugateGradients(a, damping, inverse, count, b, x, control)
      .run(residual_norms, report);
}

}  // namespace jacpot::krylov
