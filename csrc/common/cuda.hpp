// The host side of every CUDA kernel: where to run, what the device has, how to launch.
//
// Work goes to the caller's device and stream, and nothing here waits for it. Workspace is the
// caller's too, so that the framework's allocator owns all device memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/status.hpp"

#ifdef JACPOT_CUDA_EMULATOR
#include "common/cuda_emulator.hpp"
#else
#include <cuda_runtime.h>
#endif

namespace jacpot::cuda {

// A device and a stream of it, as PyTorch and CuPy give them: a cudaStream_t as an integer.
struct Queue {
  int device = 0;
  std::uintptr_t stream = 0;
};

struct Limits {
  std::int64_t shared_bytes = 0;  // that one block may ask for
  int multiprocessors = 0;
};

inline constexpr std::int64_t warp = 32;

// Fails with a message that says what to do: no driver, too old a driver, no such device, a GPU
// older than the machine code of this build.
Status limits(int device, Limits* out);

__host__ __device__ constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

Status from_error(cudaError_t error);

// Makes a device current, and the one before it again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int before_ = -1;  // -1: nothing to restore
  Status status_;
};

// Fails where no block of this device can have as much shared memory: GPUs for desktops have 99
// KiB.
Status expect_shared_memory(int device, std::int64_t bytes, Limits* has);

#ifdef JACPOT_CUDA_EMULATOR

template <class... P>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, std::int64_t shared_bytes, Queue queue,
              std::type_identity_t<P>... arguments) {
  Limits has;
  const Status status = expect_shared_memory(queue.device, shared_bytes, &has);
  if (!status.ok()) return status;
  emulator::device().launched_on = emulator::device().current;
  if (block.x * block.y * block.z > 1024)
    return {Code::invalid_argument, "a block has more than 1024 threads"};
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return {Code::invalid_argument, "a grid is empty or exceeds the limits of CUDA"};
  if (const char* fault = emulator::run_grid(grid, block, static_cast<std::size_t>(shared_bytes),
                                             [&] { kernel(arguments...); }))
    return {Code::device_error, fault};
  return {};
}

#else

template <class... P>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, std::int64_t shared_bytes, Queue queue,
              std::type_identity_t<P>... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr std::int64_t without_asking = 48 * 1024;
  if (shared_bytes > without_asking) {
    Limits has;
    const Status status = expect_shared_memory(queue.device, shared_bytes, &has);
    if (!status.ok()) return status;
    // The kernel is allowed all there is: with just what this launch takes, another thread's launch
    // of the same kernel with more could come in between.
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(has.shared_bytes));
    if (error != cudaSuccess) return from_error(error);
  }
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return from_error(cudaLaunchKernel(function, grid, block, pointers,
                                     static_cast<std::size_t>(shared_bytes),
                                     reinterpret_cast<cudaStream_t>(queue.stream)));
}

#endif

}  // namespace jacpot::cuda
