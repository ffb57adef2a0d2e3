#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "jacobian/plain_signals.hpp"
#include "jacobian/winograd.hpp"
#include "jacobian/winograd_signals.hpp"

namespace jacpot {
namespace {

void expect_contiguous_planes(const Array& signals) {
  std::int64_t step = 1;
  for (int d = signals.ndim() - 1; d > 1; step *= signals.shape(d--))
    if (signals.shape(d) > 1 && signals.stride(d) != step)
      throw py::value_error("argument 'signals' must be contiguous but for its first two axes");
}

// activations (N, G·I, height + 2, width + 2), signals (N, K, G, O, height, width)
void rows(py::handle activations, py::handle signals, py::handle out, int threads) {
  const Array result(out, "out", Access::write), a(activations, "activations"),
      s(signals, "signals");
  result.expect_cpu();
  s.expect_like(result).expect_shape(
      {Array::any, Array::any, Array::any, Array::any, Array::any, Array::any});
  a.expect_like(result).expect_contiguous().expect_shape(
      {s.shape(0), Array::any, s.shape(4) + 2, s.shape(5) + 2});
  expect_contiguous_planes(s);
  if (s.shape(2) == 0 || a.shape(1) % s.shape(2) != 0)
    throw py::value_error("argument 'activations' must have as many channels for every group");
  dispatch_float(result, [&]<class T>() {
    const ConvolutionLayer<T> layer{s.shape(0),
                                    s.shape(1),
                                    s.shape(2),
                                    s.shape(3),
                                    a.shape(1) / s.shape(2),
                                    s.shape(4),
                                    s.shape(5),
                                    static_cast<const T*>(a.data()),
                                    static_cast<const T*>(s.data()),
                                    s.stride(0),
                                    s.stride(1)};
    const std::int64_t columns = layer.groups * layer.outputs * layer.inputs * 9;
    result.expect_shape({layer.n, layer.k, columns});
    T* to = result.contiguous_data<T>();
    Status status;
    {
      py::gil_scoped_release release;
      status = convolution_rows<T>(layer, to, checked_threads(threads));
    }
    raise_if_failed(status, "rows");
  });
}

// The arguments of a way back: signals (N, K, O, *places), weight (O, I, *kernel), seen
// (N, I, *size) or None, out (N, K, I, *size).
struct Back {
  Array result, s, w;
  std::optional<Array> by_relu;

  Back(py::handle signals, py::handle weight, const py::object& seen, py::handle out)
      : result(out, "out", Access::write), s(signals, "signals"), w(weight, "weight") {
    result.expect_cpu();
    s.expect_like(result).expect_shape(
        {Array::any, Array::any, Array::any, Array::any, Array::any});
    w.expect_like(result).expect_contiguous().expect_shape(
        {s.shape(2), Array::any, Array::any, Array::any});
    expect_contiguous_planes(s);
    result.expect_contiguous().expect_shape(
        {s.shape(0), s.shape(1), w.shape(1), Array::any, Array::any});
    if (!seen.is_none())
      by_relu.emplace(seen, "seen")
          .expect_like(result)
          .expect_contiguous()
          .expect_shape({s.shape(0), w.shape(1), result.shape(3), result.shape(4)});
    if (result.size() == 0 || w.size() == 0)
      throw py::value_error("arguments 'signals', 'weight' and 'out' must not be empty");
  }

  template <class T>
  const T* relu() const {
    return by_relu ? static_cast<const T*>(by_relu->data()) : nullptr;
  }
};

// With a kernel of 3 x 3.
void signals_back(py::handle signals, py::handle weight, const py::object& seen, py::handle out,
                  int threads) {
  const Back back(signals, weight, seen, out);
  const Array &result = back.result, &s = back.s, &w = back.w;
  w.expect_shape({Array::any, Array::any, 3, 3});
  for (int d = 3; d < 5; ++d) {
    const std::int64_t around = s.shape(d) + 2 - result.shape(d);  // twice the padding
    if (around < 0 || around > 4 || around % 2 != 0)
      throw py::value_error(
          "argument 'out' must have the size of what the layer saw, with a padding of 0, 1 or 2");
  }
  dispatch_float(result, [&]<class T>() {
    const ConvolutionSignals<T> layer{s.shape(0),
                                      s.shape(1),
                                      s.shape(2),
                                      w.shape(1),
                                      s.shape(3),
                                      s.shape(4),
                                      result.shape(3),
                                      result.shape(4),
                                      static_cast<const T*>(w.data()),
                                      static_cast<const T*>(s.data()),
                                      s.stride(0),
                                      s.stride(1),
                                      back.relu<T>(),
                                      static_cast<T*>(result.data())};
    Status status;
    {
      py::gil_scoped_release release;
      status = convolution_signals<T>(layer, checked_threads(threads));
    }
    raise_if_failed(status, "convolution_signals");
  });
}

using Pair = std::array<std::int64_t, 2>;

// With any kernel, stride, padding and dilation.
void signals_back_plainly(py::handle signals, py::handle weight, const py::object& seen,
                          const Pair& stride, const Pair& padding, const Pair& dilation,
                          py::handle out, int threads) {
  const Back back(signals, weight, seen, out);
  const Array &result = back.result, &s = back.s, &w = back.w;
  for (std::size_t a = 0; a < 2; ++a) {
    const int d = static_cast<int>(a);
    if (stride[a] < 1 || dilation[a] < 1 || padding[a] < 0)
      throw py::value_error(
          "arguments 'stride' and 'dilation' must be at least 1, and 'padding' at least 0");
    const std::int64_t room =
        result.shape(d + 3) + 2 * padding[a] - dilation[a] * (w.shape(d + 2) - 1) - 1;
    if (room < 0 || room / stride[a] + 1 != s.shape(d + 3))
      throw py::value_error("argument 'out' must have the size of what the layer saw");
  }
  dispatch_float(result, [&]<class T>() {
    const PlainSignals<T> layer{s.shape(0),
                                s.shape(1),
                                s.shape(2),
                                w.shape(1),
                                {s.shape(3), s.shape(4)},
                                {result.shape(3), result.shape(4)},
                                {w.shape(2), w.shape(3)},
                                {stride[0], stride[1]},
                                {padding[0], padding[1]},
                                {dilation[0], dilation[1]},
                                static_cast<const T*>(w.data()),
                                static_cast<const T*>(s.data()),
                                s.stride(0),
                                s.stride(1),
                                back.relu<T>(),
                                static_cast<T*>(result.data())};
    Status status;
    {
      py::gil_scoped_release release;
      status = plain_signals<T>(layer, checked_threads(threads));
    }
    raise_if_failed(status, "convolution_plain_signals");
  });
}

}  // namespace

void bind_convolution(py::module_& m) {
  m.def("jacobian_convolution_rows", &rows, py::arg("activations"), py::arg("signals"),
        py::arg("out"), py::arg("threads"),
        "Writes the rows of a convolution with a kernel of 3 x 3.");
  m.def("convolution_signals", &signals_back, py::arg("signals"), py::arg("weight"),
        py::arg("seen").none(true), py::arg("out"), py::arg("threads"),
        "Takes signals back through a convolution with a kernel of 3 x 3.");
  m.def("convolution_plain_signals", &signals_back_plainly, py::arg("signals"), py::arg("weight"),
        py::arg("seen").none(true), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("out"), py::arg("threads"), "Takes signals back through any convolution.");
}

}  // namespace jacpot
