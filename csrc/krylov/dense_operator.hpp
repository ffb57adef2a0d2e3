// A dense matrix, float32 or float64, row-major. Of one said to be symmetric products at working
// accuracy may read one half only; at full accuracy they always read it all.
#pragma once

#include <memory>

#include "common/view.hpp"
#include "krylov/operator.hpp"

namespace jacpot::krylov {

std::unique_ptr<Operator> dense_operator(View<const float, 2> matrix, bool symmetric, int threads);
std::unique_ptr<Operator> dense_operator(View<const double, 2> matrix, bool symmetric, int threads);

}  // namespace jacpot::krylov
