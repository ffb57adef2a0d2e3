// Products of a layer under a mask, for several outputs: products of the activations that each
// output unit keeps, for some units, then a small product over these units for every pair of
// examples.
#pragma once

#include "jacobian/gram_active.hpp"

namespace jacpot::JACPOT_ISA {

template <class T>
struct MaskedUnits {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Accumulator = typename Panels<T>::Accumulator;
  using Line = typename Panels<T>::Line;
  static constexpr int width = Panels<T>::width, vectors = Panels<T>::vectors,
                       panel = Panels<T>::panel, block = Panels<T>::block;
  static constexpr int unit_block = 64;  // output units whose activations' products are held

  std::int64_t row_slice, column_slice, stride;  // outputs, and the stride of a row of the result
  T *signals, *products;  // (unit_block, block, row_slice), (unit_block, block, panel)

  MaskedUnits(std::int64_t rows, std::int64_t columns, std::int64_t z_stride, T* memory)
      : row_slice(rows),
        column_slice(columns),
        stride(z_stride),
        signals(memory),
        products(memory + unit_block * block * rows) {}  // may be read a vector beyond its end

  static std::int64_t scratch(std::int64_t outputs) {
    return unit_block * block * (panel + outputs) + 8 * width;
  }

  // z[(unit, k)] += Σ_u δ_right[u] ⊙ a_u[unit] · δ_left[unit, k, u] for `K` outputs of one unit.
  template <int K>
  void add_outputs(const T* left, const T* right, const std::uint32_t* active, std::int64_t count,
                   std::int64_t row, const std::int64_t* offset, const T (*index)[width],
                   T* out) const {
    RegisterTile<T, K, vectors> sums;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t u = active[i];
      const T* a = products + (u * block + row) * panel;
      Vec order[vectors];
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j)
        order[j] = Panels<T>::permute(V::load(a + offset[j]), index[j]) *
                   V::load(right + u * panel + j * width);
      sums.add(left + u * block * row_slice, order);
    }
    sums.each([=, this](Vec sum, int k, int j) __attribute__((always_inline)) {
      T* to = out + k * stride + j * width;
      V::store(to, V::load(to) + sum);
    });
  }

  static void multiply_activations(const PackedLayer<T>& layer, const T* left, const T* right,
                                   std::int64_t unit, T* out) {
    Accumulator acc;
    for (std::int64_t e = layer.row_offsets[unit]; e < layer.row_offsets[unit + 1]; ++e)
      acc.add(left + layer.columns[e] * static_cast<std::int64_t>(panel),
              right + layer.columns[e] * static_cast<std::int64_t>(panel));
    Panels<T>::store(out, acc, layer.bias ? 1 : 0);
  }

  void add(const PackedLayer<T>& layer, const PackedSignals<T>& s, const ActiveUnits& units,
           const GramPlace<T>& p, const T* left, const T* right, const Line* line) const {
    std::uint32_t active[block][unit_block + beyond_list];
    std::int64_t counts[block];  // of active units that are held
    const std::int64_t lines = p.count * row_slice;
    const std::int64_t parts = (row_slice + block - 1) / block,
                       part = (row_slice + parts - 1) / parts;
    for (std::int64_t first = 0; first < layer.outputs; first += unit_block) {
      const std::int64_t n = min(unit_block, layer.outputs - first);
      for (std::int64_t u = 0; u < n; ++u) {
        multiply_activations(layer, left, right, first + u, products + u * block * panel);
        for (std::int64_t row = 0; row < lines; row += block)
          for (int r = 0; r < block; ++r)
            signals[u * block * row_slice + row + r] =
                s.row(p.unit * row_slice + row)[(first + u) * panel + r];
      }
      for (std::int64_t r = 0; r < p.count; ++r)
        counts[r] = list_bits(units.row(p.unit + r) + first / unit_block, 1, active[r]);
      for (std::int64_t q = p.skip; q < p.panels; ++q) {
        std::int64_t offset[vectors];
        T index[vectors][width];
        for (int j = 0; j < vectors; ++j) {
          const std::int64_t column = q * panel + j * width;
          offset[j] = column / column_slice;
          for (int i = 0; i < width; ++i)
            index[j][i] = static_cast<T>((column + i) / column_slice - offset[j]);
        }
        for (std::int64_t r = 0; r < p.count; ++r) {
          const T* from = signals + r * row_slice;
          for (std::int64_t k = 0; k < row_slice; k += part)
            with_count<block>(min(part, row_slice - k), [&](auto size) {
              add_outputs<size.value>(from + k, s.right + (q * s.inner + first) * panel, active[r],
                                      counts[r], r, offset, index,
                                      p.out + line[r * row_slice + k].z + q * panel);
            });
        }
      }
    }
  }
};

}  // namespace jacpot::JACPOT_ISA
