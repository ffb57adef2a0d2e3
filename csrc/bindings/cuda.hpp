// What the bindings of CUDA kernels share: the caller's device and stream, and checks against them.
#pragma once

#include "bindings/array.hpp"
#include "common/cuda.hpp"

namespace jacpot {

// The device as Python names it. The emulator's memory is the CPU's.
inline Device device_of([[maybe_unused]] cuda::Queue queue) {
#ifdef JACPOT_CUDA_EMULATOR
  return {DeviceKind::cpu, 0};
#else
  return {DeviceKind::cuda, queue.device};
#endif
}

// An array argument on the queue's device, contiguous and of one of the dtypes.
inline Array on_queue(py::handle object, const char* name, cuda::Queue queue,
                      std::initializer_list<DType> dtypes,
                      std::initializer_list<std::int64_t> shape) {
  Array array(object, name);
  array.expect_dtype(dtypes).expect_device(device_of(queue)).expect_shape(shape);
  array.expect_contiguous();
  return array;
}

// A direction of one element has any stride, as PyTorch's versions give it: then the one asked for.
inline std::int64_t stride_or(const Array& array, int d, std::int64_t of_one) {
  return array.shape(d) > 1 ? array.stride(d) : of_one;
}

void bind_jacobian_cuda(py::module_& m);
void bind_krylov_cuda(py::module_& m);
void bind_masked_matmul_cuda(py::module_& m);

}  // namespace jacpot
