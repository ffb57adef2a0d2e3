#include "common/cuda.hpp"

#include <array>
#include <atomic>

namespace jacpot::cuda {

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  status_ = from_error(cudaGetDevice(&current));
  if (!status_.ok() || current == device) return;
  status_ = from_error(cudaSetDevice(device));
  if (status_.ok()) before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

#ifdef JACPOT_CUDA_EMULATOR

Status from_error(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {Code::invalid_argument, "there is no GPU of this number"};
}

Status limits(int, Limits* out) {
  *out = {emulator::device().shared_bytes, emulator::device().multiprocessors};
  return {};
}

#else

Status from_error(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return {};
    case cudaErrorMemoryAllocation:
      return {Code::out_of_memory, "the GPU is out of memory"};
    case cudaErrorInsufficientDriver:
      return {Code::unsupported,
              "there is no NVIDIA driver, or one that is older than the CUDA toolkit that built "
              "jacpot, see jacpot.build_info()['cuda_built']"};
    case cudaErrorNoDevice:
      return {Code::unsupported, "no NVIDIA GPU is visible to this process"};
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return {Code::unsupported,
              "this build has no machine code for this GPU, see "
              "jacpot.build_info()['cuda_architectures']"};
    case cudaErrorInvalidDevice:
      return {Code::invalid_argument, "there is no GPU of this number"};
    default:
      // The runtime's texts are static. An earlier kernel's failure may show here first.
      return {Code::device_error, cudaGetErrorString(error)};
  }
}

namespace {

Status read_limits(int device, Limits* out) {
  int devices = 0, major = 0, shared = 0, multiprocessors = 0;
  Status status = from_error(cudaGetDeviceCount(&devices));
  if (!status.ok()) return status;
  if (device < 0 || device >= devices) return from_error(cudaErrorInvalidDevice);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (status.ok()) status = from_error(cudaDeviceGetAttribute(value, attribute, device));
  };
  read(&major, cudaDevAttrComputeCapabilityMajor);
  read(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&multiprocessors, cudaDevAttrMultiProcessorCount);
  if (status.ok() && major < 8)
    return {Code::unsupported, "jacpot's kernels need a GPU of compute capability 8.0 or newer"};
  *out = {shared, multiprocessors};
  return status;
}

}  // namespace

// Attributes never change, and asking costs more than a small launch.
Status limits(int device, Limits* out) {
  constexpr std::size_t cached = 64;
  static std::array<std::atomic<std::uint64_t>, cached> cache{};
  const auto slot = static_cast<std::size_t>(device);
  if (device >= 0 && slot < cached) {
    if (const std::uint64_t known = cache[slot].load()) {
      *out = {static_cast<std::int64_t>(known >> 32), static_cast<int>(known & 0xffffffffu)};
      return {};
    }
  }
  const Status status = read_limits(device, out);
  if (status.ok() && slot < cached)
    cache[slot].store(static_cast<std::uint64_t>(out->shared_bytes) << 32 |
                      static_cast<std::uint32_t>(out->multiprocessors));
  return status;
}

#endif

Status expect_shared_memory(int device, std::int64_t bytes, Limits* has) {
  const Status status = limits(device, has);
  if (!status.ok() || bytes <= has->shared_bytes) return status;
  return {Code::unsupported,
          "a block of this kernel takes more shared memory than this GPU has: it is made for A100, "
          "H100, H200 and what has as much"};
}

}  // namespace jacpot::cuda
