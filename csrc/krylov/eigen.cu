#include "krylov/eigen_cuda.hpp"

#include <cmath>

#include "common/cuda_device.cuh"

namespace jacpot::krylov {
namespace {

using namespace cuda;

constexpr int threads = 256;
constexpr int most_sweeps = 16;  // quadratic convergence: about six are needed
constexpr double small = 1e-16;  // of what is on the diagonal: what is beside it is rounding then

// Rotations of a round: pair k of all pairs of `even` numbers, of which each meets each other one
// in even - 1 rounds (the circle method). The first is the smaller.
__device__ __forceinline__ void pair_of(int round, int k, int even, int* i, int* j) {
  const int circle = even - 1;
  const int a = (round + k) % circle;
  const int b = k == 0 ? circle : (round + circle - k) % circle;
  *i = smaller(a, b);
  *j = larger(a, b);
}

struct Rotation {
  double c, s;
};

// What makes the element (i, j) zero.
__device__ __forceinline__ Rotation rotation(double ii, double ij, double jj) {
  if (ij == 0) return {1, 0};
  const double tau = (jj - ii) / (2 * ij);
  const double t = (tau < 0 ? -1 : 1) / (fabs(tau) + sqrt(1 + tau * tau));
  const double c = 1 / sqrt(1 + t * t);
  return {c, t * c};
}

// Turns elements i and j of a line.
__device__ __forceinline__ void turn(Rotation by, double* at_i, double* at_j) {
  const double x = *at_i, y = *at_j;
  *at_i = by.c * x - by.s * y;
  *at_j = by.s * x + by.c * y;
}

// Sizes are added, not squares, which could overflow; with what is not finite it is never true.
__device__ bool is_diagonal(int n, const double* a, double* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  double on = 0, beside = 0;
  for (int e = thread; e < n * n; e += threads) (e / n == e % n ? on : beside) += fabs(a[e]);
  sums[thread] = on;
  sums[threads + thread] = beside;
  __syncthreads();
  on = beside = 0;
  for (int t = 0; t < threads; ++t) {
    on += sums[t];
    beside += sums[threads + t];
  }
  __syncthreads();
  return beside <= small * on;
}

__global__ __launch_bounds__(threads) void jacobi(int n, const double* matrix, double* values,
                                                  double* vectors) {
  double* a = shared_memory<double>();                            // (n, n)
  double* v = a + n * n;                                          // (n, n)
  double* sums = v + n * n;                                       // (2, threads)
  auto* turns = reinterpret_cast<Rotation*>(sums + 2 * threads);  // of the pairs of a round
  const int thread = static_cast<int>(threadIdx.x), even = n + n % 2, pairs = even / 2;
  for (int e = thread; e < n * n; e += threads) {
    a[e] = matrix[e];
    v[e] = e / n == e % n ? 1 : 0;
  }
  __syncthreads();
  for (int sweep = 0; sweep < most_sweeps && !is_diagonal(n, a, sums); ++sweep)
    for (int round = 0; round < even - 1; ++round) {
      for (int k = thread; k < pairs; k += threads) {
        int i, j;
        pair_of(round, k, even, &i, &j);
        turns[k] = j < n ? rotation(a[i * n + i], a[i * n + j], a[j * n + j]) : Rotation{1, 0};
      }
      __syncthreads();
      for (int e = thread; e < pairs * n; e += threads) {  // columns of both
        const int k = e / n, row = e % n;
        int i, j;
        pair_of(round, k, even, &i, &j);
        if (j >= n) continue;
        turn(turns[k], &a[row * n + i], &a[row * n + j]);
        turn(turns[k], &v[row * n + i], &v[row * n + j]);
      }
      __syncthreads();
      for (int e = thread; e < pairs * n; e += threads) {  // rows
        const int k = e / n, column = e % n;
        int i, j;
        pair_of(round, k, even, &i, &j);
        if (j < n) turn(turns[k], &a[i * n + column], &a[j * n + column]);
      }
      __syncthreads();
    }
  for (int e = thread; e < n * n; e += threads) vectors[e] = v[e];
  for (int i = thread; i < n; i += threads) values[i] = a[i * n + i];
}

constexpr std::int64_t bytes(std::int64_t n) {
  return static_cast<std::int64_t>(sizeof(double)) * (2 * n * n + 2 * threads + n + 1);
}

}  // namespace

Status cuda_eigen_limit(cuda::Queue queue, std::int64_t* size) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  for (*size = 0; bytes(*size + 1) <= limits.shared_bytes;) ++*size;
  return {};
}

Status cuda_eigen(std::int64_t size, const double* a, double* values, double* vectors,
                  cuda::Queue queue) {
  if (size == 0) return {};
  std::int64_t most = 0;
  if (const Status status = cuda_eigen_limit(queue, &most); !status.ok()) return status;
  if (size > most) return {Code::invalid_argument, "the matrix is too large for shared memory"};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  return launch(&jacobi, dim3(1), dim3(threads), bytes(size), queue, static_cast<int>(size), a,
                values, vectors);
}

}  // namespace jacpot::krylov
