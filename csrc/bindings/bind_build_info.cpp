#include <pybind11/stl.h>

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "common/blas.hpp"
#include "common/isa.hpp"
#include "common/parallel.hpp"

namespace jacpot {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::vector<std::string> names(const std::vector<Isa>& isas) {
  std::vector<std::string> out;
  for (Isa isa : isas) out.emplace_back(isa_name(isa));
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = JACPOT_VERSION;
  info["compiler"] = compiler();
  info["isas_built"] = names(built_isas());
  info["isas_supported"] = names(supported_isas());
  info["isa"] = std::string(isa_name(active_isa()));
  info["thread_runtime"] = thread_runtime();
  info["blas"] = blas::provider();
#ifdef JACPOT_WITH_CUDA
  info["cuda_built"] = JACPOT_CUDA_VERSION;
  info["cuda_architectures"] = JACPOT_CUDA_ARCHITECTURES;
#else
  info["cuda_built"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace

void bind_build_info(py::module_& m) {
  m.def(
      "set_blas_fallback",
      [](const py::capsule& sgemm, const py::capsule& dgemm) {
        blas::set_fallback(sgemm.get_pointer(), dgemm.get_pointer());
      },
      py::arg("sgemm"), py::arg("dgemm"), "Fortran GEMMs for where PyTorch exports none.");
  m.def("build_info", &build_info, "How this extension was built and what it runs on.");
  m.def("force_isa", &force_isa, py::arg("name"),
        "Use the named instruction set from now on; '' goes back to the best. False if not "
        "supported.");
  // The boundary itself, for its tests: what a checked view says of an array.
  m.def(
      "describe_array",
      [](py::handle array, bool write) {
        const Array a(array, "array", write ? Access::write : Access::read);
        py::dict out;
        out["dtype"] = dtype_name(a.dtype());
        out["device"] = a.device().kind == DeviceKind::cpu ? "cpu" : "cuda";
        std::vector<std::int64_t> shape, stride;
        for (int d = 0; d < a.ndim(); ++d) {
          shape.push_back(a.shape(d));
          stride.push_back(a.stride(d));
        }
        out["shape"] = py::tuple(py::cast(shape));
        out["stride"] = py::tuple(py::cast(stride));
        out["pointer"] = reinterpret_cast<std::uintptr_t>(a.data());
        out["contiguous"] = a.contiguous();
        return out;
      },
      py::arg("array"), py::arg("write") = false, "What the checked boundary sees of an array.");
}

}  // namespace jacpot
