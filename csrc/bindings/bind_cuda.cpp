#include "bindings/bind.hpp"
#include "bindings/cuda.hpp"

namespace jacpot {

// Every kernel takes the number of the device and the stream as an integer, does its work there
// and does not wait for it.
void bind_cuda(py::module_& m) {
  m.def(
      "limits",
      [](int device) {
        cuda::Limits limits;
        raise_if_failed(cuda::limits(device, &limits), "limits");
        return py::dict(py::arg("shared_bytes") = limits.shared_bytes,
                        py::arg("multiprocessors") = limits.multiprocessors);
      },
      py::arg("device"), "What a device has, or why it cannot be used.");
  bind_jacobian_cuda(m);
  bind_krylov_cuda(m);
  bind_masked_matmul_cuda(m);
}

}  // namespace jacpot
