// Preconditioned conjugate gradients (Hestenes & Stiefel 1952) for several right-hand sides, with
// residual replacement: products run at working accuracy (float32 as a rule), and as soon as
// their accumulated rounding could matter, the residual is recomputed at full accuracy and the
// search starts from it (van der Vorst & Ye 2000; "reliable updates" of Clark et al. 2010). So a
// float32 operator reaches float64 residuals at nearly float32 cost. beta = -(z·Ap)/(p·Ap) keeps
// directions conjugate with an inexact preconditioner.
#include <vector>

#include "krylov/solver.hpp"
#include "krylov/vectors.hpp"

namespace jacpot::krylov {
namespace {

// A replacement is due when accumulated rounding exceeds this share of the residual.
constexpr double gap_share = 0.1;
// Replacements in a row that leave the residual where it was, before it counts as stagnated.
constexpr int patience = 3;

struct Column {
  bool active = true;
  Outcome outcome = Outcome::iteration_limit;
  double norm_b = 0, norm_r = 0;
  double best = 0;         // smallest recomputed residual so far
  double gap_squared = 0;  // estimate of the rounding in the recurred residual
  double rounding = 0;     // what even the recomputed residual cannot see
  int idle = 0;
  bool claimed = false;  // the recurred residual is below the tolerance
  bool fresh = true;     // p is to be z alone

  void stop(Outcome why) {
    active = false;
    outcome = why;
  }
};

class ConjugateGradients {
 public:
  ConjugateGradients(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
                     const double* b, double* x, const Control& control)
      : a_(a),
        damping_(damping),
        inverse_(inverse),
        b_(b),
        x_(x),
        control_(control),
        shape_{a.rows(), count, control.threads},
        column_(static_cast<std::size_t>(count)),
        alpha_(column_.size()),
        curvature_(column_.size()),
        beta_(column_.size()),
        one_(column_.size(), 1.0),
        damping_column_(column_.size(), damping),
        sums_(4 * column_.size()) {}

  Status run(double* residual_norms, Report* report) {
    vectors_ = allocate_scratch<double>(4 * shape_.elements());
    partial_ = allocate_scratch<double>(shape_.chunks() * 4 * shape_.count);
    if (!vectors_ || !partial_)
      return {Code::out_of_memory, "no memory for the vectors of the solver"};
    sum(b_, b_, 0);
    for (std::size_t c = 0; c < column_.size(); ++c) column_[c].norm_b = std::sqrt(dot(0, c));
    Status status = replace_residual();
    if (status.ok() && any_active()) status = precondition();
    if (!status.ok()) return status;
    std::copy(z(), z() + shape_.elements(), p());
    while (any_active() && report_.iterations < control_.max_iterations && !interrupted_)
      if (status = iterate(); !status.ok()) return status;
    status = finish(residual_norms);
    *report = report_;
    return status;
  }

 private:
  double* r() { return vectors_.get(); }
  double* z() { return inverse_ ? vectors_.get() + shape_.elements() : r(); }
  double* p() { return vectors_.get() + 2 * shape_.elements(); }
  double* q() { return vectors_.get() + 3 * shape_.elements(); }
  void sum(const double* x, const double* y, int slot) {
    dots(shape_, x, y, partial_.get(), sums_.data() + slot * shape_.count);
  }
  double dot(int slot, std::size_t c) const {
    return sums_[static_cast<std::size_t>(slot) * column_.size() + c];
  }
  bool any_active() const {
    return std::any_of(column_.begin(), column_.end(), [](const Column& c) { return c.active; });
  }
  double damped_norm() const { return norm_a_ + std::abs(damping_); }

  Status apply(const double* in, double* out, Accuracy accuracy) {
    ++report_.products;
    const Status status = a_.apply(in, out, shape_.count, accuracy);
    if (status.ok() && damping_ != 0) combine(shape_, damping_column_.data(), in, one_.data(), out);
    return status;
  }

  Status precondition() {
    return inverse_ ? inverse_->apply(r(), z(), shape_.count, Accuracy::working) : Status{};
  }

  // r = b - (A + damping·I) x at full accuracy, and the verdict on every column.
  Status replace_residual() {
    if (std::all_of(x_, x_ + shape_.elements(), [](double v) { return v == 0; })) {
      std::copy(b_, b_ + shape_.elements(), r());
    } else {
      if (const Status status = apply(x_, r(), Accuracy::full); !status.ok()) return status;
      for (std::int64_t i = 0; i < shape_.elements(); ++i) r()[i] = b_[i] - r()[i];
    }
    sum(r(), r(), 0);
    sum(x_, x_, 1);
    for (std::size_t c = 0; c < column_.size(); ++c) {
      Column& column = column_[c];
      column.norm_r = std::sqrt(dot(0, c));
      column.gap_squared = 0;
      column.rounding = a_.unit_roundoff(Accuracy::full) * damped_norm() * std::sqrt(dot(1, c));
      if (column.active) judge(column);
    }
    return {};
  }

  void judge(Column& column) {
    const double target = control_.tolerance * column.norm_b;
    if (!std::isfinite(column.norm_r)) return column.stop(Outcome::non_finite);
    if (column.norm_r + column.rounding <= target || column.norm_r == 0)
      return column.stop(Outcome::converged);
    if (report_.iterations == 0) {
      column.best = column.norm_r;
      return;
    }
    // Only a residual that the recurrence held to be small enough can be found not to move.
    if (column.claimed) column.idle = column.norm_r < 0.7 * column.best ? 0 : column.idle + 1;
    column.claimed = false;
    column.best = std::min(column.best, column.norm_r);
    if (column.norm_r <= column.rounding || column.idle >= patience)
      column.stop(Outcome::stagnated);
  }

  Status multiply_direction() {
    ++report_.products;
    if (const Status status = a_.apply(p(), q(), shape_.count, accuracy_); !status.ok())
      return status;
    const VectorTable& kernels = vector_kernels();
    const std::int64_t n = shape_.count;
    const auto body = [&](std::int64_t begin, std::int64_t end, double* sums) {
      const std::int64_t at = begin * n;
      kernels.curvature(end - begin, n, damping_, p() + at, r() + at, q() + at, sums);
    };
    reduce(shape_, 4 * n, partial_.get(), sums_.data(), body);
    for (std::size_t c = 0; c < column_.size(); ++c)
      if (column_[c].active && dot(1, c) > 0)
        norm_a_ = std::max(norm_a_, std::sqrt(dot(2, c) / dot(1, c)));
    return {};
  }
  // No curvature along p that could be told from rounding.
  bool is_flat(std::size_t c) const {
    return dot(0, c) <= a_.unit_roundoff(accuracy_) * norm_a_ * dot(1, c);
  }
  bool any_flat() const {
    for (std::size_t c = 0; c < column_.size(); ++c)
      if (column_[c].active && is_flat(c)) return true;
    return false;
  }

  // A step of alpha along p; sums 0 are r·r.
  void advance() {
    const VectorTable& kernels = vector_kernels();
    const std::int64_t n = shape_.count;
    const auto body = [&](std::int64_t begin, std::int64_t end, double* sums) {
      const std::int64_t at = begin * n;
      kernels.advance(end - begin, n, alpha_.data(), p() + at, q() + at, x_ + at, r() + at, sums);
    };
    reduce(shape_, n, partial_.get(), sums_.data(), body);
  }

  Status iterate() {
    ++report_.iterations;
    if (const Status status = multiply_direction(); !status.ok()) return status;
    if (accuracy_ == Accuracy::working && any_flat()) {
      // Rounding of the working products may hide the sign of the curvature.
      accuracy_ = Accuracy::full;
      if (const Status status = multiply_direction(); !status.ok()) return status;
    }
    const double unit = a_.unit_roundoff(accuracy_);
    bool due = false;
    for (std::size_t c = 0; c < column_.size(); ++c) {
      Column& column = column_[c];
      alpha_[c] = 0;
      if (!column.active) continue;
      const double pq = curvature_[c] = dot(0, c), pp = dot(1, c), pr = dot(3, c);
      if (!std::isfinite(pq) || !std::isfinite(pr)) {
        column.stop(Outcome::non_finite);
        continue;
      }
      if (pr <= 0) {
        // Either a replacement on behalf of another column turned the residual away from p, and p
        // is given up for z, or z itself is no descent direction.
        if (column.fresh) column.stop(inverse_ ? Outcome::preconditioner : Outcome::stagnated);
        column.fresh = true;
        continue;
      }
      column.fresh = false;
      if (is_flat(c)) {
        // p is a null vector, and b·p = r·p is not zero.
        column.stop(pq < -unit * damped_norm() * pp ? Outcome::indefinite : Outcome::inconsistent);
        continue;
      }
      alpha_[c] = pr / pq;
      const double rounding = unit * damped_norm() * alpha_[c] * std::sqrt(pp);
      column.gap_squared += rounding * rounding;
    }
    advance();
    double worst = 0;
    for (std::size_t c = 0; c < column_.size(); ++c) {
      Column& column = column_[c];
      if (!column.active) continue;
      column.norm_r = std::sqrt(dot(0, c));
      worst = std::max(worst, column.norm_r / column.norm_b);
      column.claimed = !(column.norm_r > control_.tolerance * column.norm_b);
      // The direction belongs to the recurred residual: from the true one, where the two differ, a
      // new search takes fewer iterations.
      const bool differs = column.claimed || column.gap_squared > gap_share * gap_share *
                                                                      column.norm_r * column.norm_r;
      column.fresh |= differs;
      due |= differs;
    }
    interrupted_ = !control_.go_on(report_.iterations, worst);
    if (due) {
      if (const Status status = replace_residual(); !status.ok()) return status;
      // Replacing all the time costs more than multiplying well in the first place.
      replacements_ += 1;
      if (4 * replacements_ > report_.iterations + 16) accuracy_ = Accuracy::full;
    }
    if (!any_active()) return {};
    if (const Status status = precondition(); !status.ok()) return status;
    sum(z(), q(), 3);
    for (std::size_t c = 0; c < column_.size(); ++c)
      beta_[c] = column_[c].active && !column_[c].fresh ? -dot(3, c) / curvature_[c] : 0.0;
    combine(shape_, one_.data(), z(), beta_.data(), p());
    return {};
  }

  Status finish(double* residual_norms) {
    // The claim is only as good as the last recomputation; x of stopped columns did not move.
    std::vector<Column> verdict = column_;
    if (const Status status = replace_residual(); !status.ok()) return status;
    Outcome worst = Outcome::converged;
    std::vector<std::size_t> suspects;  // of having a part of b outside the range
    for (std::size_t c = 0; c < column_.size(); ++c) {
      Column& column = verdict[c];
      column.norm_r = column_[c].norm_r;
      column.rounding = column_[c].rounding;
      residual_norms[c] = column.norm_r;
      const double target = control_.tolerance * column.norm_b;
      if (column.norm_r + column.rounding <= target || column.norm_r == 0)
        column.outcome = Outcome::converged;
      else if (!std::isfinite(column.norm_r))
        column.outcome = Outcome::non_finite;
      else if (column.outcome == Outcome::converged)
        column.outcome = Outcome::stagnated;
      if (column.outcome == Outcome::stagnated || column.outcome == Outcome::iteration_limit)
        suspects.push_back(c);
      worst = std::max(worst, column.outcome);
    }
    if (interrupted_) suspects.clear();
    // A residual that the operator takes to zero is no rounding; mostly a working product can tell
    // that it does not.
    for (const Accuracy how : {Accuracy::working, Accuracy::full}) {
      if (suspects.empty()) break;
      if (const Status status = apply(r(), q(), how); !status.ok()) return status;
      sum(q(), q(), 0);
      const double share =
          std::max(100 * a_.unit_roundoff(how), std::sqrt(a_.unit_roundoff(Accuracy::full)));
      std::erase_if(suspects, [&](std::size_t c) {
        return !(std::sqrt(dot(0, c)) <= share * damped_norm() * verdict[c].norm_r);
      });
    }
    if (!suspects.empty()) worst = std::max(worst, Outcome::inconsistent);
    report_.outcome = interrupted_ && worst != Outcome::converged ? Outcome::interrupted : worst;
    return {};
  }

  const Operator& a_;
  const double damping_;
  const Operator* inverse_;
  const double* b_;
  double* x_;
  const Control& control_;
  const Shape shape_;
  std::vector<Column> column_;
  std::vector<double> alpha_, curvature_, beta_, one_, damping_column_, sums_;
  Scratch<double> vectors_, partial_;
  Accuracy accuracy_ = Accuracy::working;
  double norm_a_ = 0;  // a lower bound of the norm, from the products seen
  std::int64_t replacements_ = 0;
  bool interrupted_ = false;
  Report report_;
};

}  // namespace

Status cg(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
          const double* b, double* x, const Control& control, double* residual_norms,
          Report* report) {
  ConjugateGradients solver(a, damping, inverse, count, b, x, control);
  if (inverse || a.calls_out(count)) return solver.run(residual_norms, report);
  Status status;
  with_team(control.threads, [&] { status = solver.run(residual_norms, report); });
  return status;
}

}  // namespace jacpot::krylov
