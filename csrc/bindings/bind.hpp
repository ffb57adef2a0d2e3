// One function per operation; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace jacpot {

void bind_build_info(pybind11::module_& m);
void bind_convolution(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_krylov(pybind11::module_& m);
void bind_linear_layer(pybind11::module_& m);
void bind_masked_matmul(pybind11::module_& m);
void bind_max_pool(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_jacobian(pybind11::module_& m);
void bind_jacobian_live(pybind11::module_& m);
void bind_jacobian_operator(pybind11::module_& m);
void bind_subset_sum(pybind11::module_& m);

}  // namespace jacpot
