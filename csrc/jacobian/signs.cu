#include "common/cuda_device.cuh"
#include "jacobian/signs_cuda.hpp"

namespace jacpot {
namespace {

using namespace cuda;

constexpr int threads = 256;
constexpr std::int64_t word = 64;  // one hash is worth 64 columns

// The finaliser of SplitMix64, as in signs.cpp.
__device__ __forceinline__ std::uint64_t mix(std::uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

template <class T>
__global__ void draw(std::uint64_t seed, std::int64_t offset, std::int64_t count,
                     std::int64_t first, std::int64_t last, T* out) {
  const std::int64_t p = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (p >= count) return;
  const std::int64_t group = first / word + blockIdx.y;
  const std::uint64_t bits =
      mix(mix(seed + static_cast<std::uint64_t>(offset + p)) + static_cast<std::uint64_t>(group));
  const std::int64_t begin = larger(first, group * word), end = smaller(last, (group + 1) * word);
  for (std::int64_t d = begin; d < end; ++d)
    out[(d - first) * count + p] = T(1) - T(2) * static_cast<T>((bits >> (d % word)) & 1);
}

constexpr int tile = 32, rows_at_once = 8;

template <class T>
__global__ void copy_down(std::int64_t n, T* a) {
  if (blockIdx.x > blockIdx.y) return;  // tile (y, x) below the diagonal comes from (x, y)
  T* staged = shared_memory<T>();       // (tile, tile + 1): columns in different banks
  const std::int64_t row0 = std::int64_t{blockIdx.y} * tile,
                     column0 = std::int64_t{blockIdx.x} * tile;
  for (int i = static_cast<int>(threadIdx.y); i < tile; i += rows_at_once) {
    const std::int64_t r = column0 + i, c = row0 + threadIdx.x;
    if (r < n && c < n) staged[i * (tile + 1) + static_cast<int>(threadIdx.x)] = a[r * n + c];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.y); i < tile; i += rows_at_once) {
    const std::int64_t r = row0 + i, c = column0 + threadIdx.x;
    if (r < n && c < r) a[r * n + c] = staged[static_cast<int>(threadIdx.x) * (tile + 1) + i];
  }
}

}  // namespace

template <class T>
Status cuda_signs(std::uint64_t seed, std::int64_t offset, std::int64_t count, std::int64_t first,
                  std::int64_t last, T* out, cuda::Queue queue) {
  if (count == 0 || first >= last) return {};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  const std::int64_t groups = (last - 1) / word - first / word + 1;
  const std::int64_t blocks = divide_up(count, threads);
  if (groups > 65535 || blocks > INT32_MAX)
    return {Code::overflow, "too many signs for one launch"};
  return launch(&draw<T>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)),
                dim3(threads), 0, queue, seed, offset, count, first, last, out);
}

template <class T>
Status cuda_mirror(std::int64_t n, T* a, cuda::Queue queue) {
  if (n == 0) return {};
  const DeviceGuard guard(queue.device);
  if (!guard.status().ok()) return guard.status();
  const std::int64_t tiles = divide_up(n, tile);
  if (tiles > 65535) return {Code::overflow, "the matrix is too large for one launch"};
  const auto edge = static_cast<unsigned>(tiles);
  return launch(&copy_down<T>, dim3(edge, edge), dim3(tile, rows_at_once),
                static_cast<std::int64_t>(sizeof(T)) * tile * (tile + 1), queue, n, a);
}

template Status cuda_signs<float>(std::uint64_t, std::int64_t, std::int64_t, std::int64_t,
                                  std::int64_t, float*, cuda::Queue);
template Status cuda_signs<double>(std::uint64_t, std::int64_t, std::int64_t, std::int64_t,
                                   std::int64_t, double*, cuda::Queue);
template Status cuda_mirror<float>(std::int64_t, float*, cuda::Queue);
template Status cuda_mirror<double>(std::int64_t, double*, cuda::Queue);

}  // namespace jacpot
