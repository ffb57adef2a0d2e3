#include "common/cuda_device.cuh"
#include "krylov/cg_cuda.hpp"

namespace jacpot::krylov {
namespace {

using namespace cuda;

constexpr int threads = 256;

// Which elements a thread takes: those of one column, neighbours in memory being neighbours in the
// block. grid.y goes over groups of `threads` columns where there are more.
struct Place {
  int width, lines, line;  // columns of this group; rows that the block takes at once; own row
  std::int64_t column;
  bool active;

  __device__ explicit Place(const CudaColumns& shape) {
    const std::int64_t first = std::int64_t{blockIdx.y} * threads;
    width = static_cast<int>(smaller<std::int64_t>(threads, shape.count - first));
    lines = threads / width;
    line = static_cast<int>(threadIdx.x) / width;
    column = first + static_cast<int>(threadIdx.x) % width;
    active = line < lines;
  }
};

// The sum of `value` over the threads of a column, given to all of them.
__device__ double sum_column(const Place& place, double value) {
  double* sums = shared_memory<double>();
  __syncthreads();  // the sums before are used up
  sums[threadIdx.x] = place.active ? value : 0.0;
  __syncthreads();
  double total = 0;
  for (int line = 0; line < place.lines; ++line)
    total += sums[line * place.width + static_cast<int>(threadIdx.x) % place.width];
  return total;
}

__device__ double sum_partial(const CudaColumns& shape, const Place& place, const double* partial) {
  double value = 0;
  if (place.active)
    for (std::int64_t b = place.line; b < shape.blocks; b += place.lines)
      value += partial[b * shape.count + place.column];
  return sum_column(place, value);
}

template <class Body>
__device__ __forceinline__ void for_rows(const CudaColumns& shape, const Place& place,
                                         Body&& body) {
  if (!place.active) return;
  for (std::int64_t row = std::int64_t{blockIdx.x} * place.lines + place.line; row < shape.size;
       row += std::int64_t{gridDim.x} * place.lines)
    body(row * shape.count + place.column);
}

template <class T>
__global__ __launch_bounds__(threads) void curvature_kernel(CudaColumns shape, const double* x,
                                                            const T* y, double damping,
                                                            double* partial) {
  const Place place(shape);
  double sum = 0;
  for_rows(shape, place,
           [&](std::int64_t e) { sum += x[e] * (static_cast<double>(y[e]) + damping * x[e]); });
  sum = sum_column(place, sum);
  if (place.line == 0) partial[blockIdx.x * shape.count + place.column] = sum;
}

template <class T>
__global__ __launch_bounds__(threads) void update_kernel(CudaColumns shape, const double* p,
                                                         const T* product, double damping,
                                                         const double* curvature, const double* rz,
                                                         double* x, double* r, double* partial,
                                                         std::int32_t* negative) {
  const Place place(shape);
  const double pq = sum_partial(shape, place, curvature);
  const double alpha = pq > 0 && place.active ? rz[place.column] / pq : 0.0;
  double sum = 0;
  for_rows(shape, place, [&](std::int64_t e) {
    x[e] += alpha * p[e];
    const double left = r[e] - alpha * (static_cast<double>(product[e]) + damping * p[e]);
    r[e] = left;
    sum += left * left;
  });
  sum = sum_column(place, sum);
  if (place.line == 0) {
    partial[blockIdx.x * shape.count + place.column] = sum;
    if (blockIdx.x == 0 && pq < 0) negative[place.column] = 1;
  }
}

template <class T>
__global__ __launch_bounds__(threads) void direction_kernel(CudaColumns shape, const double* z,
                                                            const double* partial, const double* rz,
                                                            double* next_rz, double* p,
                                                            T* working) {
  const Place place(shape);
  const double next = sum_partial(shape, place, partial);
  const double before = place.active ? rz[place.column] : 0.0;
  const double beta = before > 0 ? next / before : 0.0;
  for_rows(shape, place, [&](std::int64_t e) {
    const double direction = z[e] + beta * p[e];
    p[e] = direction;
    working[e] = static_cast<T>(direction);
  });
  if (blockIdx.x == 0 && place.line == 0) next_rz[place.column] = next;
}

template <class... P>
Status run(void (*kernel)(P...), const CudaColumns& shape, cuda::Queue queue,
           std::type_identity_t<P>... arguments) {
  if (shape.size == 0 || shape.count == 0) return {};
  const std::int64_t groups = divide_up(shape.count, threads);
  if (shape.blocks < 1 || shape.blocks > INT32_MAX || groups > 65535)
    return {Code::overflow, "too many columns or blocks for one launch"};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  return launch(kernel, dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(groups)),
                dim3(threads), threads * static_cast<std::int64_t>(sizeof(double)), queue,
                arguments...);
}

}  // namespace

Status cuda_blocks(std::int64_t size, std::int64_t count, cuda::Queue queue, std::int64_t* blocks) {
  Limits limits;
  if (const Status status = cuda::limits(queue.device, &limits); !status.ok()) return status;
  constexpr std::int64_t per_multiprocessor = 4;
  const std::int64_t lines = larger<std::int64_t>(1, threads / larger<std::int64_t>(1, count));
  *blocks = larger<std::int64_t>(
      1, smaller(divide_up(size, lines), per_multiprocessor * limits.multiprocessors));
  return {};
}

template <class T>
Status cuda_curvature(CudaColumns shape, const double* x, const T* y, double damping,
                      double* partial, cuda::Queue queue) {
  return run(&curvature_kernel<T>, shape, queue, shape, x, y, damping, partial);
}

template <class T>
Status cuda_update(CudaColumns shape, const double* p, const T* product, double damping,
                   const double* curvature, const double* rz, double* x, double* r, double* partial,
                   std::int32_t* negative, cuda::Queue queue) {
  return run(&update_kernel<T>, shape, queue, shape, p, product, damping, curvature, rz, x, r,
             partial, negative);
}

template <class T>
Status cuda_direction(CudaColumns shape, const double* z, const double* partial, const double* rz,
                      double* next_rz, double* p, T* working, cuda::Queue queue) {
  return run(&direction_kernel<T>, shape, queue, shape, z, partial, rz, next_rz, p, working);
}

#define JACPOT_INSTANTIATE(T)                                                                 \
  template Status cuda_curvature<T>(CudaColumns, const double*, const T*, double, double*,    \
                                    cuda::Queue);                                             \
  template Status cuda_update<T>(CudaColumns, const double*, const T*, double, const double*, \
                                 const double*, double*, double*, double*, std::int32_t*,     \
                                 cuda::Queue);                                                \
  template Status cuda_direction<T>(CudaColumns, const double*, const double*, const double*, \
                                    double*, double*, T*, cuda::Queue);
JACPOT_INSTANTIATE(float)
JACPOT_INSTANTIATE(double)
#undef JACPOT_INSTANTIATE

}  // namespace jacpot::krylov
