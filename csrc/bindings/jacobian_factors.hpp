// How the factors of a layer cross the boundary: checked, and as the kernels take them.
#pragma once

#include "bindings/array.hpp"
#include "jacobian/gram.hpp"
#include "jacobian/products.hpp"

namespace jacpot {

// Factors as they come: activations (N, T, G, I) and signals (N, K, T, G, O), innermost stride 1.
struct Factors {
  Array activations, signals;

  explicit Factors(const py::tuple& pair, bool positions_may_be_innermost = false)
      : Factors(pair, Device{}) {
    expect_unit_stride(activations, 3);
    if (!positions_may_be_innermost || (signals.stride(2) != 1 && signals.shape(2) > 1))
      expect_unit_stride(signals, 4);
  }
  // Of any strides, for those that check what they can take.
  Factors(const py::tuple& pair, Device device)
      : activations(pair[0], "activations"), signals(pair[1], "signals") {
    if (device == Device{})
      activations.expect_cpu();
    else
      activations.expect_device(device);
    activations.expect_shape({Array::any, Array::any, Array::any, Array::any});
    signals.expect_like(activations);
    const std::int64_t n = activations.shape(0), t = activations.shape(1), g = activations.shape(2);
    signals.expect_shape({n, Array::any, t, g, Array::any});
  }
  static void expect_unit_stride(const Array& array, int d) {
    if (array.size() > 0 && array.shape(d) > 1 && array.stride(d) != 1)
      throw py::value_error("argument '" + array.name() + "' must have an innermost stride of 1");
  }
  template <class T>
  GramFactors<T> group(std::int64_t g) const {
    return {static_cast<const T*>(activations.data()) + g * activations.stride(2),
            activations.stride(0),
            activations.stride(1),
            static_cast<const T*>(signals.data()) + g * signals.stride(3),
            signals.stride(0),
            signals.stride(1),
            signals.stride(2)};
  }
};

// Kept weights of `rows` rows, where they are not None.
inline void read_kept(const py::handle& row_offsets, const py::handle& columns, std::int64_t rows,
                      const std::int64_t*& offsets, const std::int32_t*& indices) {
  if (row_offsets.is_none()) return;
  offsets =
      Array(row_offsets, "row_offsets").expect_shape({rows + 1}).contiguous_data<std::int64_t>();
  indices = Array(columns, "columns").contiguous_data<std::int32_t>();
}

// A layer for the products: activations contiguous, signals contiguous from their positions on.
template <class T>
ProductLayer<T> product_layer(const Factors& f, const py::handle& row_offsets,
                              const py::handle& columns, bool bias, bool squared) {
  f.activations.expect_contiguous();
  ProductLayer<T> layer{};
  layer.n = f.signals.shape(0);
  layer.k = f.signals.shape(1);
  layer.positions = f.signals.shape(2);
  layer.groups = f.signals.shape(3);
  layer.outputs = f.signals.shape(4);
  layer.inputs = f.activations.shape(3);
  const auto follow = [&](std::initializer_list<int> inner_to_outer) {
    if (f.signals.size() == 0) return true;
    std::int64_t step = 1;
    for (const int d : inner_to_outer) {
      if (f.signals.shape(d) > 1 && f.signals.stride(d) != step) return false;
      step *= f.signals.shape(d);
    }
    return true;
  };
  layer.positions_innermost = !follow({4, 3, 2});
  if (layer.positions_innermost && !follow({2, 4, 3}))
    throw py::value_error(
        "argument 'signals' must be contiguous from its positions on, or these be innermost");
  layer.activations = f.activations.contiguous_data<T>();
  layer.signals = static_cast<const T*>(f.signals.data());
  layer.signals_example = f.signals.stride(0);
  layer.signals_output = f.signals.stride(1);
  read_kept(row_offsets, columns, layer.groups * layer.outputs, layer.row_offsets, layer.columns);
  layer.bias = bias;
  layer.squared = squared;
  return layer;
}

}  // namespace jacpot
