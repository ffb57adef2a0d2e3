// The bodies that are compiled per instruction set. A panel is `width` examples, feature by
// feature: (features, width), contiguous and aligned, so that one weight meets whole vectors.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "masked_matmul/masked_matmul.hpp"

namespace jacpot::masked_matmul {

// The runs of lines [first, last) in one tile of a pattern.
struct Tile {
  const Lines& lines;
  std::int64_t first, last;
  std::int64_t tile;
};

// Kernels for one panel width. Values and their gradients are in the order of the lines' entries.
// Panels of lines (`x`, `out`) begin at line `first` of the tile; the panel that is indexed begins
// at feature 0.
template <class T>
struct Shape {
  std::int64_t width = 0;

  // Copies features [first, last) of examples [example, example + width) into a panel; zeros
  // beyond the last example.
  void (*pack)(const Activations<const T>& from, std::int64_t example, std::int64_t first,
               std::int64_t last, T* panel) = nullptr;
  // The way back; examples beyond the last are dropped.
  void (*unpack)(const T* panel, std::int64_t example, std::int64_t first, std::int64_t last,
                 const Activations<T>& to) = nullptr;
  // out[l] (+)= Σ values[e] · panel[index[e]]; it is set by the first tile.
  void (*multiply)(const Tile& tile, const T* values, const T* panel, T* out) = nullptr;
  // d_values[e] += ⟨x[l], panel[index[e]]⟩.
  void (*sample)(const Tile& tile, const T* panel, const T* x, T* d_values) = nullptr;
  // Both of the above in one walk: each loaded vector of the panel feeds two FMAs.
  void (*fused)(const Tile& tile, const T* values, const T* panel, const T* x, T* out,
                T* d_values) = nullptr;
  // out[l] = max(out[l] + bias[l], 0) or its parts, in place; `out` begins at line `first`.
  void (*finish)(std::int64_t first, std::int64_t last, const T* bias, bool relu, T* out) = nullptr;
};

template <class T>
struct Kernels {
  static constexpr int count = 5;
  Shape<T> shapes[count];  // in rising width; the first is of one example
  int forward, backward;   // how many of them the walks use
};

}  // namespace jacpot::masked_matmul

namespace jacpot {
struct MaskedMatmulTable {
  masked_matmul::Kernels<float> f32;
  masked_matmul::Kernels<double> f64;
};
JACPOT_DISPATCH_TABLE(MaskedMatmulTable)
}  // namespace jacpot
