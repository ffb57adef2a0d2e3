// Restarts from the recomputed residual: how the short-recurrence solvers reach float64 residuals
// with a float32 operator. One right-hand side.
#pragma once

#include <algorithm>
#include <cmath>

#include "krylov/solver.hpp"
#include "krylov/vectors.hpp"

namespace jacpot::krylov {

// Solver has
//   Status residual(b, x)     recomputes the residual at full accuracy
//   Outcome verdict(x)        on it; iteration_limit stands for "go on"
//   double measure()          what a restart must make smaller
//   Status correct(x)         iterates from the residual and adds the correction to x
//   Outcome stop              why there is no going on after that; iteration_limit: there is
//   accuracy, report
template <class Solver>
Status refine(Solver& solver, const double* b, double* x, const Control& control) {
  double before = INFINITY;
  while (true) {
    if (const Status status = solver.residual(b, x); !status.ok()) return status;
    Outcome outcome = solver.verdict(x);
    if (outcome == Outcome::iteration_limit) {
      if (solver.stop != Outcome::iteration_limit) {
        outcome = solver.stop;
      } else if (!(solver.measure() < 0.5 * before) && solver.accuracy == Accuracy::full) {
        outcome = Outcome::stagnated;
      } else if (solver.report.iterations < control.max_iterations) {
        if (!(solver.measure() < 0.5 * before)) solver.accuracy = Accuracy::full;
        before = std::min(before, solver.measure());
        if (const Status status = solver.correct(x); !status.ok()) return status;
        continue;
      }
    }
    solver.report.outcome = outcome;
    return {};
  }
}

// Runs `make()`'s solvers over the columns of b and x, one after another.
template <class Make>
Status for_columns(const Operator& a, const Operator* inverse, std::int64_t count, const double* b,
                   double* x, double* residual_norms, Report* report, const Control& control,
                   Make&& make) {
  const auto column = allocate_scratch<double>(a.rows() + a.columns());
  if (!column) return {Code::out_of_memory, "no memory for the vectors of the solver"};
  double *one_b = column.get(), *one_x = one_b + a.rows();
  report->outcome = Outcome::converged;
  for (std::int64_t c = 0; c < count && report->outcome != Outcome::interrupted; ++c) {
    for (std::int64_t i = 0; i < a.rows(); ++i) one_b[i] = b[i * count + c];
    for (std::int64_t i = 0; i < a.columns(); ++i) one_x[i] = x[i * count + c];
    auto solver = make();
    Status status = solver.allocate();
    const auto run = [&] {
      if (status.ok()) status = refine(solver, one_b, one_x, control);
    };
    inverse || a.calls_out(1) ? run() : with_team(control.threads, run);
    for (std::int64_t i = 0; i < a.columns(); ++i) x[i * count + c] = one_x[i];
    if (!status.ok()) return status;
    residual_norms[c] = solver.residual_norm();
    report->outcome = std::max(report->outcome, solver.report.outcome);
    report->iterations = std::max(report->iterations, solver.report.iterations);
    report->products += solver.report.products;
  }
  return {};
}

}  // namespace jacpot::krylov
