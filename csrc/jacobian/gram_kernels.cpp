#include "common/simd.hpp"
#include "jacobian/gram.hpp"
#include "jacobian/gram_panels.hpp"
#include "jacobian/transpose.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

// Output units of a masked layer whose activations' products are held.
constexpr int unit_block = 64;

template <class T>
struct Gram {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Accumulator = typename Panels<T>::Accumulator;
  static constexpr int width = Panels<T>::width, vectors = Panels<T>::vectors,
                       panel = Panels<T>::panel, block = Panels<T>::block;
  // Inner indices whose columns, and the rows that pass by, stay in L1 together.
  static constexpr std::int64_t segment =
      (24 << 10) / (panel * static_cast<std::int64_t>(sizeof(T)));

  const GramPlan<T>& plan;
  const GramTile& tile;
  std::int64_t row_slice, column_slice;  // outputs in the tile's slices
  std::int64_t rows, columns;            // examples
  std::int64_t stride;                   // of a row of z
  T *z, *partial, *flipped, *products, *spread, *units, *unit_signals;

  static std::int64_t stride_of(const GramPlan<T>& p) { return panel * p.slice + width; }
  static std::int64_t size_of_z(const GramPlan<T>& p) { return p.chunk * p.slice * stride_of(p); }
  static std::int64_t size_of_flipped(const GramPlan<T>& p) {
    return panel * p.slice * (p.chunk * p.slice + width);
  }

  static std::int64_t scratch(const GramPlan<T>& p) {
    return p.pairs * size_of_z(p) * 2 + size_of_flipped(p) + block * (panel + panel * p.slice) +
           unit_block * block * (panel + p.slice) + 8 * width;
  }

  Gram(const GramPlan<T>& p, const GramTile& t, T* memory) : plan(p), tile(t) {
    row_slice = min(p.slice, p.width - t.left_slice * p.slice);
    column_slice = min(p.slice, p.width - t.right_slice * p.slice);
    rows = min(min(p.chunk, panel - t.first), p.n - t.group * panel - t.first);
    columns = min(panel, p.m - t.columns * panel);
    stride = stride_of(p);
    z = memory;
    partial = z + p.pairs * size_of_z(p);
    flipped = partial + p.pairs * size_of_z(p);
    products = flipped + size_of_flipped(p);
    spread = products + block * panel;
    unit_signals = spread + block * panel * p.slice;
    units = unit_signals + unit_block * block * p.slice;  // may be read a vector beyond its end
  }

  static JACPOT_INLINE std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  // Where a row (unit, output) of a block belongs in z, and its unit's activations' products.
  struct Line {
    std::int64_t z, a;
  };
  Line line_of[block * gram_max_slice];

  void find_lines(std::int64_t unit, std::int64_t count, std::int64_t positions) {
    Line* line = line_of;
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t k = 0; k < row_slice; ++k)
        *line++ = {(((unit + r) / positions - tile.first) * row_slice + k) * stride,
                   r * panel * column_slice};
  }

  // z[row] += a[unit of row] ⊙ acc[row], vector by vector.
  static JACPOT_INLINE void multiply_into(T* out, const T* a, const Line* line, std::int64_t count,
                                          const Accumulator& acc) {
#pragma GCC unroll 8
    for (int r = 0; r < block; ++r) {
      if (r < count) {
        T* to = out + line[r].z;
        const T* factor = a + line[r].a;
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j)
          V::store(to + j * width,
                   V::fma(V::load(factor + j * width), acc.v[r][j], V::load(to + j * width)));
      }
    }
  }

  void spread_columns(const T* a) {
    for (int r = 0; r < block; ++r) {
      T* to = spread + r * panel * column_slice;
      for (int j = 0; j < panel; ++j)
        for (std::int64_t l = 0; l < column_slice; ++l) *to++ = a[r * panel + j];
    }
  }

  struct Signals {
    const T *left, *right;  // of this slice and group; the right ones of this panel of units
    std::int64_t inner;
    JACPOT_INLINE const T* row(std::int64_t row) const {
      return left + row / panel * inner * panel + row % panel;
    }
  };

  // One block of `block` units (rows) against one panel of units (columns), of one layer.
  struct Place {
    std::int64_t unit;    // first of the rows, counted in their group
    std::int64_t count;   // rows that exist, at most block
    std::int64_t panels;  // of columns (unit, output) that hold any
    std::int64_t skip;    // of those, below the diagonal
    T* out;
  };

  Signals signals(const PackedLayer<T>& layer, std::int64_t pair, std::int64_t unit_panel) const {
    return {plan.left[tile.group] + layer.signals + (tile.left_slice + pair) * layer.signals_slice,
            plan.right[tile.columns] + layer.signals +
                (tile.right_slice + pair) * layer.signals_slice +
                unit_panel * column_slice * layer.inner * panel,
            layer.inner};
  }

  // Σ over [from, to) of the signals' inner index, times the activations' products in a.
  void add_products(const Signals& s, const Place& p, const T* a, T* out, std::int64_t from,
                    std::int64_t to) {
    const std::int64_t lines = p.count * row_slice;
    const std::int64_t step = lines > block ? segment : to - from;
    for (std::int64_t q = p.skip; q < p.panels; ++q)
      for (std::int64_t x = from; x < to; x += step) {
        const T* right = s.right + (q * s.inner + x) * panel;
        for (std::int64_t row = 0; row < lines; row += block) {
          Accumulator acc;
          acc.add(s.row(p.unit * row_slice + row) + x * panel, right, min(step, to - x));
          multiply_into(out + q * panel, a + q * panel, line_of + row, lines - row, acc);
        }
      }
  }

  void add_constant(const PackedLayer<T>& layer, const Place& p, const T* a) {
    const std::int64_t length = panel * column_slice;
    for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
      for (std::int64_t k = 0; k < row_slice; ++k) {
        const T* from = layer.constant + ((tile.left_slice + pair) * plan.slice + k) * plan.width +
                        (tile.right_slice + pair) * plan.slice;
        T* line = flipped;  // free until the tile is written
        for (std::int64_t j = 0; j < panel; ++j)
          for (std::int64_t l = 0; l < column_slice; ++l) *line++ = from[l];
        for (std::int64_t r = 0; r < p.count; ++r) {
          T* out =
              p.out + pair * size_of_z(plan) + ((p.unit + r - tile.first) * row_slice + k) * stride;
          for (std::int64_t c = p.skip * panel; c < length; c += width)
            V::store(out + c,
                     V::fma(V::load(a + r * length + c), V::load(flipped + c), V::load(out + c)));
        }
      }
  }

  // Output units, of those that are held, whose signals in a row are not all zero: about half of
  // them where a ReLU follows.
  struct Active {
    std::int64_t count;
    std::int32_t unit[unit_block];
  };
  Active find_active(const T* left, std::int64_t n) const {
    Active active{0, {}};
    for (std::int64_t u = 0; u < n; ++u) {
      bool any = false;
      for (std::int64_t k = 0; k < row_slice; ++k) any |= left[u * block * row_slice + k] != 0;
      active.unit[active.count] = static_cast<std::int32_t>(u);
      active.count += any;
    }
    return active;
  }

  // z[(unit, k)] += Σ_u δ_right[u] ⊙ a_u[unit] · δ_left[unit, k, u] for `K` outputs of one unit.
  template <int K>
  void add_units(const T* left, const T* right, const Active& active, std::int64_t row,
                 const std::int64_t* offset, const T (*index)[width], T* out) const {
    Vec acc[K][vectors], order[vectors];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) acc[k][j] = V::zero();
    for (std::int64_t i = 0; i < active.count; ++i) {
      const std::int64_t u = active.unit[i];
      const T* a = units + (u * block + row) * panel;
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j)
        order[j] = Panels<T>::permute(V::load(a + offset[j]), index[j]) *
                   V::load(right + u * panel + j * width);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Vec b = V::broadcast(left[u * block * row_slice + k]);
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j) acc[k][j] = V::fma(b, order[j], acc[k][j]);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) {
        T* to = out + k * stride + j * width;
        V::store(to, V::load(to) + acc[k][j]);
      }
  }

  template <int K>
  JACPOT_INLINE void add_units_of(std::int64_t count, const T* left, const T* right,
                                  const Active& active, std::int64_t row,
                                  const std::int64_t* offset, const T (*index)[width],
                                  T* out) const {
    if (count == K)
      add_units<K>(left, right, active, row, offset, index, out);
    else if constexpr (K > 1)
      add_units_of<K - 1>(count, left, right, active, row, offset, index, out);
  }

  void multiply_activations(const PackedLayer<T>& layer, const T* left, const T* right,
                            std::int64_t unit, T* out) {
    Accumulator acc;
    for (std::int64_t e = layer.row_offsets[unit]; e < layer.row_offsets[unit + 1]; ++e)
      acc.add(left + layer.columns[e] * static_cast<std::int64_t>(panel),
              right + layer.columns[e] * static_cast<std::int64_t>(panel));
    acc.store(out, layer.bias ? 1 : 0);
  }

  // A masked layer, several outputs: products of kept activations for some units, then a small
  // product over these units for every pair of examples.
  void add_masked(const PackedLayer<T>& layer, const Signals& s, const Place& p, const T* left,
                  const T* right) {
    const std::int64_t lines = p.count * row_slice;
    const std::int64_t parts = (row_slice + block - 1) / block,
                       part = (row_slice + parts - 1) / parts;
    for (std::int64_t first = 0; first < layer.outputs; first += unit_block) {
      const std::int64_t n = min(unit_block, layer.outputs - first);
      for (std::int64_t u = 0; u < n; ++u) {
        multiply_activations(layer, left, right, first + u, units + u * block * panel);
        for (std::int64_t row = 0; row < lines; row += block)
          for (int r = 0; r < block; ++r)
            unit_signals[u * block * row_slice + row + r] =
                s.row(p.unit * row_slice + row)[(first + u) * panel + r];
      }
      Active active[block];
      for (std::int64_t r = 0; r < p.count; ++r)
        active[r] = find_active(unit_signals + r * row_slice, n);
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
          const std::int64_t example = (p.unit + r) / layer.positions - tile.first;
          for (std::int64_t k = 0; k < row_slice; k += part)
            add_units_of<block>(min(part, row_slice - k), unit_signals + r * row_slice + k,
                                s.right + (q * s.inner + first) * panel, active[r], r, offset,
                                index, p.out + (example * row_slice + k) * stride + q * panel);
        }
      }
    }
  }

  void add_block(const PackedLayer<T>& layer, const Place& p, std::int64_t unit_panel) {
    const T* left = plan.left[tile.group] + layer.activations +
                    p.unit / panel * layer.inputs * panel + p.unit % panel;
    const T* right =
        plan.right[tile.columns] + layer.activations + unit_panel * layer.inputs * panel;
    const bool single = row_slice == 1 && column_slice == 1;
    find_lines(p.unit, p.count, layer.positions);
    if (layer.row_offsets) {
      if (!single) return add_masked(layer, signals(layer, 0, unit_panel), p, left, right);
      const std::int64_t inner = layer.inner / layer.outputs;
      for (std::int64_t u = 0; u < layer.outputs; ++u) {
        multiply_activations(layer, left, right, u, products);
        for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
          add_products(signals(layer, pair, unit_panel), p, products,
                       p.out + pair * size_of_z(plan), u * inner, (u + 1) * inner);
      }
      return;
    }
    Accumulator acc;
    acc.add(left, right, layer.inputs);
    acc.store(products, layer.bias ? 1 : 0);
    const T* a = products;
    if (column_slice > 1) {
      spread_columns(products);
      a = spread;
    }
    if (layer.constant) return add_constant(layer, p, a);
    for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
      add_products(signals(layer, pair, unit_panel), p, a, p.out + pair * size_of_z(plan), 0,
                   layer.inner);
  }

  void add_layer(const PackedLayer<T>& layer, bool diagonal) {
    const std::int64_t row_units = rows * layer.positions, column_units = columns * layer.positions;
    const std::int64_t begin = tile.first * layer.positions;
    const bool positions = layer.positions > 1;
    for (std::int64_t q = diagonal ? begin / panel : 0; q * panel < column_units; ++q) {
      const std::int64_t held = min(panel, column_units - q * panel) * column_slice;
      const std::int64_t skip = diagonal && !positions ? begin * column_slice / panel : 0;
      if (positions) clear(partial);
      for (std::int64_t unit = 0; unit < row_units; unit += block)
        add_block(layer,
                  {begin + unit, min(block, row_units - unit), (held + panel - 1) / panel, skip,
                   positions ? partial : z},
                  q);
      if (positions) add_positions(layer.positions, q, held);
    }
  }

  // z[(n, k), (m, l)] += Σ_s partial[(n, k), (m, s, l)]
  void add_positions(std::int64_t positions, std::int64_t q, std::int64_t held) {
    for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
      for (std::int64_t row = 0; row < rows * row_slice; ++row) {
        const T* from = partial + pair * size_of_z(plan) + row * stride;
        T* to = z + pair * size_of_z(plan) + row * stride;
        for (std::int64_t c = 0, unit = q * panel; c < held; ++unit) {
          T* at = to + unit / positions * column_slice;
          for (std::int64_t l = 0; l < column_slice; ++l) at[l] += from[c++];
        }
      }
  }

  void clear(T* out) {
    for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
      for (std::int64_t row = 0; row < rows * row_slice; ++row)
        for (std::int64_t c = 0; c < panel * column_slice; c += width)
          V::store(out + pair * size_of_z(plan) + row * stride + c, V::zero());
  }

  // from (n, k) x (m, l) to the output, examples [begin, end) of the columns.
  static void write(T* out, const T* from, std::int64_t from_stride, std::int64_t n, std::int64_t k,
                    std::int64_t n_step, std::int64_t k_step, std::int64_t begin, std::int64_t end,
                    std::int64_t l, std::int64_t m_step, std::int64_t l_step) {
    const bool together = (l == 1 || l_step == 1) && m_step == l;
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < k; ++j) {
        const T* line = from + (i * k + j) * from_stride;
        T* to = out + i * n_step + j * k_step;
        if (together) {
          std::int64_t c = begin * l;
          for (; c + width <= end * l; c += width) V::store(to + c, V::load(line + c));
          for (; c < end * l; ++c) to[c] = line[c];
        } else {
          for (std::int64_t c = begin; c < end; ++c)
            for (std::int64_t q = 0; q < l; ++q) to[c * m_step + q * l_step] = line[c * l + q];
        }
      }
  }

  void finish(bool diagonal) {
    const GramPlan<T>& p = plan;
    const std::int64_t n = tile.group * panel + tile.first, m = tile.columns * panel;
    for (std::int64_t pair = 0; pair < tile.pairs; ++pair) {
      T* from = z + pair * size_of_z(p);
      const std::int64_t k = (tile.left_slice + pair) * p.slice,
                         l = (tile.right_slice + pair) * p.slice;
      const bool above =
          tile.left_slice<tile.right_slice, below = tile.left_slice> tile.right_slice;
      // A tile on the diagonal that crosses slices is written from the one above only.
      const std::int64_t direct = diagonal ? (below ? tile.first + rows : tile.first) : 0;
      if (diagonal && !above && !below) {
        T* square = from + tile.first * column_slice;
        for (std::int64_t i = 0; i < rows * row_slice; ++i)
          for (std::int64_t j = 0; j < i; ++j) square[i * stride + j] = square[j * stride + i];
      }
      write(
          p.out + n * p.row_example + k * p.row_output + m * p.column_example + l * p.column_output,
          from, stride, rows, row_slice, p.row_example, p.row_output, direct, columns, column_slice,
          p.column_example, p.column_output);
      if (!tile.mirrored) continue;
      const std::int64_t mirrored = diagonal ? (above ? tile.first : tile.first + rows) : 0;
      const std::int64_t flip_stride = p.chunk * p.slice + width;
      transpose(from, stride, rows * row_slice, columns * column_slice, flipped, flip_stride);
      write(p.out + (m + mirrored) * p.row_example + l * p.row_output + n * p.column_example +
                k * p.column_output,
            flipped + mirrored * column_slice * flip_stride, flip_stride, columns - mirrored,
            column_slice, p.row_example, p.row_output, 0, rows, row_slice, p.column_example,
            p.column_output);
    }
  }

  void run() {
    const bool diagonal = plan.symmetric && tile.group == tile.columns;
    clear(z);
    for (std::int64_t i = 0; i < plan.n_layers; ++i) add_layer(plan.layers[i], diagonal);
    finish(diagonal);
  }

  static void run_tile(const GramPlan<T>& plan, const GramTile& tile, T* memory) {
    Gram(plan, tile, memory).run();
  }

  static void turn(const T* from, std::int64_t from_stride, std::int64_t n, std::int64_t m, T* to,
                   std::int64_t to_stride) {
    transpose(from, from_stride, n, m, to, to_stride);
  }

  static constexpr GramKernels<T> kernels() {
    return {panel, block, &Panels<T>::pack, &scratch, &run_tile, &turn};
  }
};

constexpr GramTable gram_table{Gram<float>::kernels(), Gram<double>::kernels()};

}  // namespace

const GramTable& table(const GramTable*) { return gram_table; }

}  // namespace jacpot::JACPOT_ISA
