// The BLAS that is already in the process: PyTorch's (MKL as a rule), or SciPy's as a fallback.
// Dense GEMM is not ours, and a BLAS of our own would bring its own threads.
//
// Row-major, as the kernels keep their arrays. Leading dimensions count elements.
#pragma once

#include <cstdint>

#include "common/status.hpp"

namespace jacpot::blas {

// C (m, n) = alpha · op(A) (m, k) · op(B) (k, n) + beta · C
Status gemm(bool transpose_a, bool transpose_b, std::int64_t m, std::int64_t n, std::int64_t k,
            float alpha, const float* a, std::int64_t lda, const float* b, std::int64_t ldb,
            float beta, float* c, std::int64_t ldc);
Status gemm(bool transpose_a, bool transpose_b, std::int64_t m, std::int64_t n, std::int64_t k,
            double alpha, const double* a, std::int64_t lda, const double* b, std::int64_t ldb,
            double beta, double* c, std::int64_t ldc);

// The Fortran symbols to use where PyTorch exports none; called once, at import.
void set_fallback(void* sgemm, void* dgemm);
const char* provider();  // "torch", "scipy" or "none"

}  // namespace jacpot::blas
