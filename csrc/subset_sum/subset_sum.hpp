// The subset of a few numbers whose sum is nearest to a target.
//
// Horowitz and Sahni (1974): the sums of either half of the numbers, sorted, and one sweep over
// both from opposite ends. 2^(n/2) work instead of 2^n.
#pragma once

#include <cstdint>

#include "common/status.hpp"
#include "common/view.hpp"

namespace jacpot::subset_sum {

// A half has at most 2^16 sums: 16-bit subsets keep the lists small, and they stay in L2.
inline constexpr std::int64_t max_samples = 32;

// For each row m of samples (M, n): bit j of subsets[m] says whether samples[m, j] is in the
// subset, and sums[m] is the subset's sum, added up in float64 from j = 0 on. Of several nearest
// subsets any is returned, the same one at every number of threads.
template <class T>
Status nearest(View<const T, 2> samples, View<const T, 1> targets, std::int64_t* subsets,
               double* sums, int threads);

}  // namespace jacpot::subset_sum
