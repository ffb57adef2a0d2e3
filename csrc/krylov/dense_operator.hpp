// A dense matrix, float32 or float64, row-major.
#pragma once

#include <memory>

#include "common/view.hpp"
#include "krylov/operator.hpp"

namespace jacpot::krylov {

std::unique_ptr<Operator> dense_operator(View<const float, 2> matrix, int threads);
std::unique_ptr<Operator> dense_operator(View<const double, 2> matrix, int threads);

}  // namespace jacpot::krylov
