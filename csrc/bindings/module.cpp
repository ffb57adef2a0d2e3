#include "bindings/bind.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled kernels of jacpot. Use the functions of the jacpot package instead.";
  jacpot::bind_build_info(m);
#ifdef JACPOT_WITH_CUDA
  auto cuda = m.def_submodule("cuda", "Kernels for tensors on a GPU.");
  jacpot::bind_cuda(cuda);
#endif
  jacpot::bind_convolution(m);
  jacpot::bind_krylov(m);
  jacpot::bind_linear_layer(m);
  jacpot::bind_masked_matmul(m);
  jacpot::bind_max_pool(m);
  jacpot::bind_memory(m);
  jacpot::bind_jacobian(m);
  jacpot::bind_jacobian_live(m);
  jacpot::bind_jacobian_operator(m);
  jacpot::bind_subset_sum(m);
}
