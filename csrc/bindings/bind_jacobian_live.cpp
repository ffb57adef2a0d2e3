#include <optional>

#include "bindings/bind.hpp"
#include "bindings/jacobian_factors.hpp"
#include "bindings/live_factors.hpp"

namespace jacpot {
namespace {

// Factors without the units that are off, or None where more than `most` of them are not.
py::object live_factors(const py::tuple& pair, const py::object& row_offsets,
                        const py::object& columns, bool bias, double most, int threads) {
  const Factors factors(pair, Device{});
  factors.activations.expect_contiguous();
  return dispatch_float(factors.activations, [&]<class T>() -> py::object {
    const auto signals = factors.signals.view<const T, 5>();
    const T* activations = factors.activations.contiguous_data<const T>();
    const std::int64_t* offsets = nullptr;
    const std::int32_t* indices = nullptr;
    read_kept(row_offsets, columns, factors.signals.shape(3) * factors.signals.shape(4), offsets,
              indices);
    std::optional<LiveLayer<T>> layer;
    Status status;
    {
      const py::gil_scoped_release release;
      status = LiveLayer<T>::make(signals, activations, factors.activations.shape(3), offsets,
                                  indices, bias, most, checked_threads(threads), layer);
    }
    raise_if_failed(status, "live_factors");
    if (!layer) return py::none();
    return py::cast(LiveFactors{pair[0], row_offsets, columns, std::move(*layer)});
  });
}

// out (N, K, R) += J · vᵀ, v (R, P)
void jvp_of_live(const LiveFactors& factors, py::handle v, py::handle out, int threads) {
  const Array vectors(v, "v"), result(out, "out", Access::write);
  vectors.expect_cpu().expect_like(result);
  dispatch_float(result.expect_cpu(), [&]<class T>() {
    const auto& layer = factors.of_type<T>();
    const std::int64_t r = vectors.expect_shape({Array::any, layer.parameters()}).shape(0);
    const T* from = vectors.contiguous_data<const T>();
    T* to = result.expect_shape({layer.n, layer.k, r}).template contiguous_data<T>();
    Status status;
    {
      const py::gil_scoped_release release;
      status = jvp<T>(layer, from, r, to, checked_threads(threads));
    }
    raise_if_failed(status, "jvp");
  });
}

// out (R, P) = uᵀ · J, u (N, K, R)
void vjp_of_live(const LiveFactors& factors, py::handle u, py::handle out, int threads) {
  const Array vectors(u, "u"), result(out, "out", Access::write);
  vectors.expect_cpu().expect_like(result);
  dispatch_float(result.expect_cpu(), [&]<class T>() {
    const auto& layer = factors.of_type<T>();
    const std::int64_t r = vectors.expect_shape({layer.n, layer.k, Array::any}).shape(2);
    const T* from = vectors.contiguous_data<const T>();
    T* to = result.expect_shape({r, layer.parameters()}).template contiguous_data<T>();
    Status status;
    {
      const py::gil_scoped_release release;
      status = vjp<T>(layer, from, r, to, checked_threads(threads));
    }
    raise_if_failed(status, "vjp");
  });
}

}  // namespace

void bind_jacobian_live(py::module_& m) {
  py::class_<LiveFactors>(m, "LiveFactors", "Factors of a layer without the units that are off.")
      .def_property_readonly("nbytes",
                             [](const LiveFactors& factors) {
                               return std::visit([](const auto& layer) { return layer.bytes(); },
                                                 factors.layer);
                             })
      .def("jvp", &jvp_of_live, py::arg("v"), py::arg("out"), py::arg("threads"),
           "Adds the product of the layer's Jacobian with vectors.")
      .def("vjp", &vjp_of_live, py::arg("u"), py::arg("out"), py::arg("threads"),
           "The product of the layer's transposed Jacobian with vectors.");
  m.def("jacobian_live_factors", &live_factors, py::arg("factors"),
        py::arg("row_offsets").none(true), py::arg("columns").none(true), py::arg("bias"),
        py::arg("most"), py::arg("threads"),
        "Factors without the units that are off; None where more than `most` of them are not.");
}

}  // namespace jacpot
