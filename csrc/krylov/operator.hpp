// What the solvers know of a matrix: how to multiply by it. Vectors are float64 and row-major,
// (size, columns); an operator may compute in a narrower type when `working` accuracy is asked,
// and owes its best when `full` is: the residuals that decide convergence are computed with it.
#pragma once

#include <cstdint>

#include "common/status.hpp"

namespace jacpot::krylov {

enum class Accuracy { working, full };

class Operator {
 public:
  virtual ~Operator() = default;
  virtual std::int64_t rows() const = 0;
  virtual std::int64_t columns() const = 0;
  virtual double unit_roundoff(Accuracy accuracy) const = 0;
  // Whether products of `count` columns run in other libraries, with threads of their own.
  virtual bool calls_out(std::int64_t) const { return true; }
  // y (rows, count) = A · x (columns, count)
  virtual Status apply(const double* x, double* y, std::int64_t count, Accuracy accuracy) const = 0;
  // y (columns, count) = Aᵀ · x (rows, count)
  virtual Status apply_transposed(const double* x, double* y, std::int64_t count,
                                  Accuracy accuracy) const = 0;
  // u (rows) = A · v - alpha · u and w (columns) = Aᵀ · u of the new u: what a matrix in memory
  // gives in one pass over it. `spare` (rows) is for those that cannot.
  virtual Status apply_both(const double* v, double alpha, double* u, double* w, double* spare,
                            Accuracy accuracy) const {
    if (const Status status = apply(v, spare, 1, accuracy); !status.ok()) return status;
    for (std::int64_t i = 0; i < rows(); ++i) u[i] = spare[i] - alpha * u[i];
    return apply_transposed(u, w, 1, accuracy);
  }
};

}  // namespace jacpot::krylov
