// Eigenvalues and vectors of one small symmetric matrix, without a wait: for the blocks of as many
// right-hand sides as share a search space.
//
// Jacobi's method with rotations of disjoint pairs at once (Brent & Luk 1985, SIAM J. Sci. Stat.
// Comput. 6), in the shared memory of one block of threads.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"

namespace jacpot::krylov {

// The largest matrix that fits.
Status cuda_eigen_limit(cuda::Queue queue, std::int64_t* size);

// a = vectors · diag(values) · vectorsᵀ for a (size, size); values (size,) in no order. Of what is
// not finite in `a`, so are the results.
Status cuda_eigen(std::int64_t size, const double* a, double* values, double* vectors,
                  cuda::Queue queue);

}  // namespace jacpot::krylov
