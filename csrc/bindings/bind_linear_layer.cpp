#include <optional>

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "linear_layer/linear_layer.hpp"

namespace jacpot {
namespace {

// Any strides but that of the last axis.
template <class T, int Rank>
View<T, Rank> rows(const Array& array) {
  const auto view = array.view<T, Rank>();
  if (view.stride[Rank - 1] != 1 && view.shape[Rank - 1] > 1) array.expect_contiguous();
  return view;
}

void forward(py::handle x_object, py::handle weight_object, py::object bias_object,
             py::handle y_object, int threads) {
  const Array x(x_object, "x"), weight(weight_object, "weight"), y(y_object, "y", Access::write);
  x.expect_cpu().expect_shape({Array::any, Array::any});
  weight.expect_like(x).expect_shape({Array::any, x.shape(1)});
  y.expect_like(x).expect_shape({x.shape(0), weight.shape(0)});
  std::optional<Array> bias;
  if (!bias_object.is_none())
    bias.emplace(bias_object, "bias").expect_like(x).expect_shape({weight.shape(0)});
  checked_threads(threads);
  const Status status = dispatch_float(x, [&]<class T>() {
    const auto from = rows<const T, 2>(x), matrix = rows<const T, 2>(weight);
    const auto to = rows<T, 2>(y);
    const T* added = bias ? bias->contiguous_data<const T>() : nullptr;
    const py::gil_scoped_release release;
    return linear_layer::forward<T>(from, matrix, added, to, threads);
  });
  raise_if_failed(status, "linear_layer");
}

void backward(py::handle signals_object, py::handle weight_object, py::handle out_object,
              int threads) {
  const Array signals(signals_object, "signals"), weight(weight_object, "weight"),
      out(out_object, "out", Access::write);
  signals.expect_cpu().expect_shape({Array::any, Array::any, Array::any});
  weight.expect_like(signals).expect_shape({signals.shape(2), Array::any});
  out.expect_like(signals).expect_shape({signals.shape(0), signals.shape(1), weight.shape(1)});
  checked_threads(threads);
  const Status status = dispatch_float(signals, [&]<class T>() {
    const auto from = rows<const T, 3>(signals);
    const auto matrix = rows<const T, 2>(weight);
    const auto to = rows<T, 3>(out);
    const py::gil_scoped_release release;
    return linear_layer::backward<T>(from, matrix, to, threads);
  });
  raise_if_failed(status, "linear_layer_backward");
}

}  // namespace

void bind_linear_layer(py::module_& m) {
  m.def("linear_layer", &forward, py::arg("x"), py::arg("weight"), py::arg("bias").none(true),
        py::arg("y"), py::arg("threads"), "y = x · weightᵀ + bias, for few examples.");
  m.def("linear_layer_backward", &backward, py::arg("signals"), py::arg("weight"), py::arg("out"),
        py::arg("threads"),
        "out = signals · weight, without the outputs where all signals of an example are zero.");
}

}  // namespace jacpot
