// The vector part of an iteration of conjugate gradients on a GPU, in three passes that read their
// scalars from device memory: nothing has to be known on the host, so nothing waits.
//
//   curvature   p·q of every column, for q = A p + damping p
//   update      x += alpha p, r -= alpha q, with alpha = rz / p·q; sums r·r
//   direction   p = z + beta p, with beta = new rz / rz
//
// Vectors are float64 (size, count), row-major; products with the operator come and go in its own
// type. Sums are made per block in a fixed order, so results do not vary from run to run.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"

namespace jacpot::krylov {

struct CudaColumns {
  std::int64_t size = 0, count = 0;
  std::int64_t blocks = 0;  // that share the rows: partial sums are (blocks, count)
};

// How many blocks a device's vectors are best cut into.
Status cuda_blocks(std::int64_t size, std::int64_t count, cuda::Queue queue, std::int64_t* blocks);

// partial[b, c] = sum of x·(y + damping x) over the rows of block b.
template <class T>
Status cuda_curvature(CudaColumns shape, const double* x, const T* y, double damping,
                      double* partial, cuda::Queue queue);

// curvature and partial are (blocks, count); rz is (count,). A column whose curvature is not
// positive is left as it is, and flagged where the curvature is negative.
template <class T>
Status cuda_update(CudaColumns shape, const double* p, const T* product, double damping,
                   const double* curvature, const double* rz, double* x, double* r, double* partial,
                   std::int32_t* negative, cuda::Queue queue);

// next_rz[c] = sum of partial[:, c]; `working` receives p in the operator's type. z may be r.
template <class T>
Status cuda_direction(CudaColumns shape, const double* z, const double* partial, const double* rz,
                      double* next_rz, double* p, T* working, cuda::Queue queue);

}  // namespace jacpot::krylov
