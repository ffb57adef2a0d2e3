// Factors of a layer without the units that are off, as Python holds them.
#pragma once

#include <variant>

#include "bindings/array.hpp"
#include "jacobian/live.hpp"

namespace jacpot {

struct LiveFactors {
  py::object activations, row_offsets, columns;  // kept alive
  std::variant<LiveLayer<float>, LiveLayer<double>> layer;

  // Refuses layers of another type.
  template <class T>
  const LiveLayer<T>& of_type() const {
    if (const auto* own = std::get_if<LiveLayer<T>>(&layer)) return *own;
    throw py::type_error("argument 'blocks' must all have one dtype");
  }
};

}  // namespace jacpot
