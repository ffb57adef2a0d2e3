#include "common/simd.hpp"
#include "jacobian/gram.hpp"
#include "jacobian/gram_active.hpp"
#include "jacobian/gram_masked.hpp"
#include "jacobian/gram_panels.hpp"
#include "jacobian/transpose.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

template <class T>
struct Gram {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Accumulator = typename Panels<T>::Accumulator;
  using Signals = PackedSignals<T>;
  using Place = GramPlace<T>;
  static constexpr int width = Panels<T>::width, vectors = Panels<T>::vectors,
                       panel = Panels<T>::panel, block = Panels<T>::block;

  const GramPlan<T>& plan;
  const GramTile& tile;
  std::int64_t row_slice, column_slice;  // outputs in the tile's slices
  std::int64_t rows, columns;            // examples
  std::int64_t stride;                   // of a row of z
  T *z, *partial, *flipped, *products, *spread;
  ActiveSignals<T> active;
  MaskedUnits<T> masked;

  static std::int64_t stride_of(const GramPlan<T>& p) { return panel * p.slice + width; }
  static std::int64_t size_of_z(const GramPlan<T>& p) { return p.chunk * p.slice * stride_of(p); }
  static std::int64_t size_of_flipped(const GramPlan<T>& p) {
    return panel * p.slice * (p.chunk * p.slice + width);
  }

  static std::int64_t scratch(const GramPlan<T>& p) {
    return p.pairs * size_of_z(p) * 2 + size_of_flipped(p) + block * (panel + panel * p.slice) +
           ActiveSignals<T>::scratch(p.slice) + MaskedUnits<T>::scratch(p.slice);
  }

  Gram(const GramPlan<T>& p, const GramTile& t, T* memory)
      : plan(p),
        tile(t),
        row_slice(min(p.slice, p.width - t.left_slice * p.slice)),
        column_slice(min(p.slice, p.width - t.right_slice * p.slice)),
        rows(min(min(p.chunk, panel - t.first), p.n - t.group * panel - t.first)),
        columns(min(panel, p.m - t.columns * panel)),
        stride(stride_of(p)),
        z(memory),
        partial(z + p.pairs * size_of_z(p)),
        flipped(partial + p.pairs * size_of_z(p)),
        products(flipped + size_of_flipped(p)),
        spread(products + block * panel),
        active{row_slice, spread + block * panel * p.slice},
        masked(row_slice, column_slice, stride, active.values + active.scratch(p.slice)) {}

  // Of the rows (unit, output) of a block.
  typename Panels<T>::Line line_of[block * gram_max_slice];

  void find_lines(std::int64_t unit, std::int64_t count, std::int64_t positions) {
    auto* line = line_of;
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t k = 0; k < row_slice; ++k)
        *line++ = {(((unit + r) / positions - tile.first) * row_slice + k) * stride,
                   r * panel * column_slice};
  }

  void spread_columns(const T* a) {
    for (int r = 0; r < block; ++r) {
      T* to = spread + r * panel * column_slice;
      for (int j = 0; j < panel; ++j)
        for (std::int64_t l = 0; l < column_slice; ++l) *to++ = a[r * panel + j];
    }
  }

  Signals signals(const PackedLayer<T>& layer, std::int64_t pair, std::int64_t unit_panel) const {
    return {plan.left[tile.group] + layer.signals + (tile.left_slice + pair) * layer.signals_slice,
            plan.right[tile.columns] + layer.signals +
                (tile.right_slice + pair) * layer.signals_slice +
                unit_panel * column_slice * layer.inner * panel,
            layer.inner};
  }

  static ActiveUnits active_units(const PackedLayer<T>& layer, const T* group, std::int64_t slice,
                                  std::int64_t first) {
    const auto* bits = reinterpret_cast<const std::uint64_t*>(group + layer.active);
    return {bits + (slice * panel * layer.positions + first) * layer.words, layer.words};
  }

  // Σ over [from, to) of the signals' inner index, times the activations' products in a.
  void add_products(const Signals& s, const Place& p, const T* a, T* out, std::int64_t from,
                    std::int64_t to) {
    const std::int64_t lines = p.count * row_slice;
    const std::int64_t step = lines > block ? Panels<T>::segment : to - from;
    for (std::int64_t q = p.skip; q < p.panels; ++q)
      for (std::int64_t x = from; x < to; x += step) {
        const T* right = s.right + (q * s.inner + x) * panel;
        for (std::int64_t row = 0; row < lines; row += block) {
          Accumulator acc;
          acc.add(s.row(p.unit * row_slice + row) + x * panel, panel, right, panel,
                  min(step, to - x));
          Panels<T>::multiply_into(out + q * panel, a + q * panel, line_of + row, lines - row, acc);
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
            V::store(out + c, V::fma(V::load(a + r * length + c), V::load(flipped + c),
                                     p.is_first ? V::zero() : V::load(out + c)));
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
    const ActiveUnits units = active_units(layer, plan.left[tile.group], tile.left_slice, 0);
    if (layer.row_offsets) {
      if (!single)
        return masked.add(layer, signals(layer, 0, unit_panel), units, p, left, right, line_of);
      const std::int64_t inner = layer.inner / layer.outputs;
      for (std::int64_t u = 0; u < layer.outputs; ++u) {
        MaskedUnits<T>::multiply_activations(layer, left, right, u, products);
        for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
          add_products(signals(layer, pair, unit_panel), p, products,
                       p.out + pair * size_of_z(plan), u * inner, (u + 1) * inner);
      }
      return;
    }
    Accumulator acc;
    acc.add(left, panel, right, panel, layer.inputs);
    Panels<T>::store(products, acc, layer.bias ? 1 : 0);
    const T* a = products;
    if (column_slice > 1) {
      spread_columns(products);
      a = spread;
    }
    if (layer.constant) return add_constant(layer, p, a);
    if (layer.skips_zeros)
      return active.add(
          {signals(layer, 0, unit_panel), units,
           active_units(layer, plan.right[tile.columns], tile.right_slice, unit_panel * panel),
           column_slice, min(panel, columns * layer.positions - unit_panel * panel) * column_slice,
           p, a, line_of});
    for (std::int64_t pair = 0; pair < tile.pairs; ++pair)
      add_products(signals(layer, pair, unit_panel), p, a, p.out + pair * size_of_z(plan), 0,
                   layer.inner);
  }

  // The panels of columns of all layers are dealt to the parts in turn.
  void add_layer(std::int64_t index, bool diagonal, bool is_first) {
    const PackedLayer<T>& layer = plan.layers[index];
    const std::int64_t row_units = rows * layer.positions, column_units = columns * layer.positions;
    const std::int64_t begin = tile.first * layer.positions;
    const bool positions = layer.positions > 1;
    for (std::int64_t q = diagonal ? begin / panel : 0; q * panel < column_units; ++q) {
      if ((index + q) % plan.parts != plan.part) continue;
      const std::int64_t held = min(panel, column_units - q * panel) * column_slice;
      const std::int64_t skip = diagonal && !positions ? begin * column_slice / panel : 0;
      // Columns of a panel are of use to rows of no later example: the rest is mirrored.
      const std::int64_t last = ((q + 1) * panel - 1) / layer.positions;
      const std::int64_t used = diagonal && tile.left_slice == tile.right_slice
                                    ? min(row_units, (last + 1) * layer.positions - begin)
                                    : row_units;
      if (positions) clear(partial);
      for (std::int64_t unit = 0; unit < used; unit += block)
        add_block(layer,
                  {begin + unit, min(block, used - unit), (held + panel - 1) / panel, skip,
                   positions ? partial : z, is_first},
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
  void write(T* out, const T* from, std::int64_t from_stride, std::int64_t n, std::int64_t k,
             std::int64_t n_step, std::int64_t k_step, std::int64_t begin, std::int64_t end,
             std::int64_t l, std::int64_t m_step, std::int64_t l_step) const {
    const bool together = (l == 1 || l_step == 1) && m_step == l;
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < k; ++j) {
        const T* line = from + (i * k + j) * from_stride;
        T* to = out + i * n_step + j * k_step;
        if (together) {
          write_line(to + begin * l, line + begin * l, (end - begin) * l);
        } else {
          for (std::int64_t c = begin; c < end; ++c)
            for (std::int64_t q = 0; q < l; ++q) to[c * m_step + q * l_step] = line[c * l + q];
        }
      }
  }

  // Whole vectors past the caches, if asked for: a line that is stored is read first otherwise.
  void write_line(T* to, const T* from, std::int64_t n) const {
    std::int64_t c = 0;
    if (plan.streams) {
      for (; c < n && reinterpret_cast<std::uintptr_t>(to + c) % sizeof(Vec) != 0; ++c)
        to[c] = from[c];
      for (; c + width <= n; c += width) V::stream(to + c, V::load(from + c));
    }
    for (; c + width <= n; c += width) V::store(to + c, V::load(from + c));
    for (; c < n; ++c) to[c] = from[c];
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
    // Constant signals come first, and fill a whole tile.
    const bool is_filled =
        !diagonal && plan.parts == 1 && plan.n_layers > 0 && plan.layers[0].constant;
    if (!is_filled) clear(z);
    for (std::int64_t i = 0; i < plan.n_layers; ++i) add_layer(i, diagonal, is_filled && i == 0);
    finish(diagonal);
    if (plan.streams) V::end_stream();
  }

  static void run_tile(const GramPlan<T>& plan, const GramTile& tile, T* memory) {
    Gram(plan, tile, memory).run();
  }

  static void turn(const T* from, std::int64_t from_stride, std::int64_t n, std::int64_t m, T* to,
                   std::int64_t to_stride) {
    transpose(from, from_stride, n, m, to, to_stride);
  }

  static constexpr GramKernels<T> kernels() {
    return {
        panel,     block, Panels<T>::vectors, &Panels<T>::pack, &Panels<T>::mark_active, &scratch,
        &run_tile, &turn};
  }
};

constexpr GramTable gram_table{Gram<float>::kernels(), Gram<double>::kernels()};

}  // namespace

const GramTable& table(const GramTable*) { return gram_table; }

}  // namespace jacpot::JACPOT_ISA
