// Signals of the live units as sparse products meet them, in which V a and Σ_k u_k δ_k are of all
// units: numbers of the live ones are taken from the first, and set in the second.
#pragma once

#include <algorithm>

#include "jacobian/live.hpp"
#include "jacobian/products.hpp"

namespace jacpot {

template <class T>
struct LiveSignals {
  const LiveLayer<T>& l;
  const ProductKernels<T>& kernel = kernels_of<ProductTable, T>();

  const T* data() const { return l.signals(); }
  std::int64_t begin(std::int64_t example) const { return l.k * l.starts()[example * l.positions]; }
  std::int64_t length(std::int64_t example) const {
    return l.starts()[(example + 1) * l.positions] - l.starts()[example * l.positions];
  }
  bool needs_room() const { return true; }

  // body(unit among the example's T·G·O, its place among the live ones)
  template <class F>
  void each(std::int64_t example, F&& body) const {
    std::int64_t place = 0;
    for (std::int64_t t = 0; t < l.positions; ++t)
      for (std::int64_t g = 0; g < l.groups; ++g)
        for (std::int64_t b = 0; b < l.unit_blocks(); ++b) {
          const std::int64_t* begins = l.row_begins(g, b) + example * l.positions + t;
          const std::int64_t first = t * l.units() + g * l.outputs + b * l.block;
          for (std::int64_t e = begins[0]; e < begins[1]; ++e)
            body(first + l.units_of_rows()[e], place++);
        }
  }
  void dot(std::int64_t example, const T* z, std::int64_t r, std::int64_t stride, T* live,
           T* out) const {
    for (std::int64_t j = 0; j < r; ++j)
      each(example, [from = z + j * stride, to = live + j * stride](
                        std::int64_t unit, std::int64_t place) { to[place] = from[unit]; });
    kernel.dot(data() + begin(example), l.k, length(example), length(example), live, r, stride,
               false, out);
  }
  void combine(std::int64_t example, const T* u, std::int64_t r, std::int64_t stride, T* live,
               T* w) const {
    kernel.combine(data() + begin(example), l.k, length(example), length(example), u, r, stride,
                   false, live);
    for (std::int64_t j = 0; j < r; ++j) {
      std::fill_n(w + j * stride, l.positions * l.units(), T(0));
      each(example, [from = live + j * stride, to = w + j * stride](
                        std::int64_t unit, std::int64_t place) { to[unit] = from[place]; });
    }
  }
};

}  // namespace jacpot
