#include <pybind11/stl.h>

#include <array>

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "max_pool/max_pool.hpp"

namespace jacpot {
namespace {

using Pair = std::array<std::int64_t, 2>;

// How windows lie; ValueError unless every one meets what is pooled.
MaxPool geometry(const Pair& size, const Pair& places, const Pair& kernel, const Pair& stride,
                 const Pair& padding, const Pair& dilation) {
  for (std::size_t a = 0; a < 2; ++a) {
    const bool laid = kernel[a] > 0 && stride[a] > 0 && dilation[a] > 0 && padding[a] >= 0 &&
                      padding[a] <= dilation[a] * (kernel[a] - 1);
    const bool meet = places[a] > 0 && (places[a] - 1) * stride[a] < size[a] + padding[a] &&
                      (padding[a] == 0 || dilation[a] <= size[a]);
    if (!laid || !meet) throw py::value_error("every window must meet what is pooled");
  }
  if (kernel[0] * kernel[1] >= MaxPool::none)
    throw py::value_error("argument 'kernel' must have fewer than 255 elements");
  return {{size[0], size[1]},     {places[0], places[1]},   {kernel[0], kernel[1]},
          {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

// x (N, C, *size), out and taps (N, C, *places)
void forward(py::handle x_object, py::handle out_object, py::handle taps_object, bool behind_relu,
             const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation,
             int threads) {
  const Array x(x_object, "x"), out(out_object, "out", Access::write),
      taps(taps_object, "taps", Access::write);
  x.expect_cpu().expect_contiguous().expect_shape({Array::any, Array::any, Array::any, Array::any});
  out.expect_like(x).expect_contiguous().expect_shape(
      {x.shape(0), x.shape(1), Array::any, Array::any});
  taps.expect_cpu().expect_contiguous().expect_shape(
      {x.shape(0), x.shape(1), out.shape(2), out.shape(3)});
  const MaxPool layer = geometry({x.shape(2), x.shape(3)}, {out.shape(2), out.shape(3)}, kernel,
                                 stride, padding, dilation);
  auto* to = taps.contiguous_data<std::uint8_t>();
  const Status status = dispatch_float(x, [&]<class T>() {
    const T* from = x.contiguous_data<const T>();
    T* largest = out.contiguous_data<T>();
    py::gil_scoped_release release;
    return max_pool<T>(layer, from, x.shape(0) * x.shape(1), behind_relu, largest, to,
                       checked_threads(threads));
  });
  raise_if_failed(status, "max_pool");
}

// signals (N, K, C, *places), taps (N, C, *places), out (N, K, C, *size)
void backward(py::handle signals_object, py::handle taps_object, py::handle out_object,
              const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation,
              int threads) {
  const Array signals(signals_object, "signals"), taps(taps_object, "taps"),
      out(out_object, "out", Access::write);
  signals.expect_cpu().expect_shape({Array::any, Array::any, Array::any, Array::any, Array::any});
  std::int64_t step = 1;
  for (int d = 4; d > 1; step *= signals.shape(d--))
    if (signals.shape(d) > 1 && signals.stride(d) != step)
      throw py::value_error("argument 'signals' must be contiguous but for its first two axes");
  out.expect_like(signals).expect_contiguous().expect_shape(
      {signals.shape(0), signals.shape(1), signals.shape(2), Array::any, Array::any});
  taps.expect_cpu().expect_shape(
      {signals.shape(0), signals.shape(2), signals.shape(3), signals.shape(4)});
  const MaxPool layer = geometry({out.shape(3), out.shape(4)}, {signals.shape(3), signals.shape(4)},
                                 kernel, stride, padding, dilation);
  const auto* from = taps.contiguous_data<const std::uint8_t>();
  const Status status = dispatch_float(signals, [&]<class T>() {
    const PooledSignals<T> given{signals.shape(0),
                                 signals.shape(1),
                                 signals.shape(2),
                                 static_cast<const T*>(signals.data()),
                                 signals.stride(0),
                                 signals.stride(1),
                                 from,
                                 out.contiguous_data<T>()};
    py::gil_scoped_release release;
    return max_pool_backward<T>(layer, given, checked_threads(threads));
  });
  raise_if_failed(status, "max_pool_backward");
}

}  // namespace

void bind_max_pool(py::module_& m) {
  m.def("max_pool", &forward, py::arg("x"), py::arg("out"), py::arg("taps"), py::arg("behind_relu"),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("threads"), "Pools, and tells which tap was largest.");
  m.def("max_pool_backward", &backward, py::arg("signals"), py::arg("taps"), py::arg("out"),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("threads"), "Takes signals back through a max pooling.");
}

}  // namespace jacpot
