// The solvers' common terms: when to stop, whom to tell, and what came out.
//
// `converged` has one meaning for all of them: the residual, recomputed from x with the operator
// at full accuracy, is below the tolerance by more than what rounding could hide.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "krylov/operator.hpp"

namespace jacpot::krylov {

enum class Outcome {
  converged,
  stagnated,  // the residual cannot be made smaller in this arithmetic
  iteration_limit,
  indefinite,      // a direction of negative curvature
  inconsistent,    // singular, and the right-hand side is not in the range
  preconditioner,  // the preconditioner is not positive definite
  non_finite,
  interrupted  // by the monitor
};

struct Control {
  double tolerance = 1e-6;  // relative to the norm of each right-hand side
  std::int64_t max_iterations = 0;
  int threads = 1;
  // Called once an iteration with the largest relative residual (recurred, not recomputed).
  // False stops the solver, which leaves its iterate in x.
  bool (*monitor)(void* context, std::int64_t iteration, double residual) = nullptr;
  void* context = nullptr;

  bool go_on(std::int64_t iteration, double residual) const {
    return !monitor || monitor(context, iteration, residual);
  }
};

struct Report {
  Outcome outcome = Outcome::iteration_limit;
  std::int64_t iterations = 0;
  std::int64_t products =
      0;  // applications of the operator or its transpose, to any number of columns
};

// Every solver: b and x are (size, count), row-major; x holds the first guess and then the result;
// residual_norms (count) receives the norms of the recomputed residuals.

// (A + damping·I) x = b for symmetric positive definite A; `inverse` approximates the inverse of
// the damped operator, or is null. Each column has its own recurrence, products are shared.
Status cg(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
          const double* b, double* x, const Control& control, double* residual_norms,
          Report* report);

// The same with one search space for all right-hand sides, which may be dependent.
Status block_cg(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
                const double* b, double* x, const Control& control, double* residual_norms,
                Report* report);

// (A + damping·I) x = b for symmetric A of any signature; `inverse` approximates the inverse of its
// absolute value, or is null. Of a singular and inconsistent system x is a least-squares solution
// (in the norm of `inverse`), and the outcome says `inconsistent`. Columns one after another.
Status minres(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
              const double* b, double* x, const Control& control, double* residual_norms,
              Report* report);

// min ‖A x - b‖² + damping·‖x‖² for any A; `inverse` approximates the inverse of AᵀA + damping·I,
// or is null: then, of all minimisers, it is the one of least norm when x starts at zero.
// Converged: ‖r‖ <= tolerance·‖b‖, or ‖Aᵀr‖ <= tolerance·‖A‖·‖r‖ where there is no exact solution
// (r of the damped system when there is damping). Columns one after another.
Status lsmr(const Operator& a, double damping, const Operator* inverse, std::int64_t count,
            const double* b, double* x, const Control& control, double* residual_norms,
            Report* report);

}  // namespace jacpot::krylov
