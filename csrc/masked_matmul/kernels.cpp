#include "masked_matmul/kernels.hpp"

#include "common/shuffle.hpp"
#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

using masked_matmul::Activations;
using masked_matmul::Kernels;
using masked_matmul::Lines;
using masked_matmul::Shape;
using masked_matmul::Tile;

// The runs of a tile: their first line's start, and the feature that indices count from.
struct Runs {
  const std::int32_t* starts;
  std::int64_t base;

  explicit Runs(const Tile& tile)
      : starts(tile.lines.starts + tile.tile * tile.lines.lines),
        base(tile.tile * tile.lines.span) {}
};

// Calls the body with the indices in their type.
template <class F>
JACPOT_INLINE void with_indices(const Lines& lines, F&& body) {
  if (lines.index_bytes == 2)
    body(static_cast<const std::uint16_t*>(lines.indices));
  else
    body(static_cast<const std::int32_t*>(lines.indices));
}

// A batch of indices, read in words: the ports that load are what bounds the kernels.
template <class Index, int count>
struct Batch {
  static constexpr int size = count;
  Index at[count];
  explicit JACPOT_INLINE Batch(const Index* from) { std::memcpy(at, from, sizeof(at)); }
  template <int i>
  JACPOT_INLINE std::int64_t get() const {
    return at[i];
  }
};
template <int count>
  requires(count % 4 == 0)
struct Batch<std::uint16_t, count> {
  static constexpr int size = count;
  std::uint64_t words[count / 4];
  explicit JACPOT_INLINE Batch(const std::uint16_t* from) {
    std::memcpy(words, from, sizeof(words));
  }
  template <int i>
  JACPOT_INLINE std::int64_t get() const {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return static_cast<std::int64_t>(words[i / 4] >> (16 * (i % 4)) & 0xffff);
#else
    return static_cast<std::int64_t>(words[i / 4] >> (48 - 16 * (i % 4)) & 0xffff);
#endif
  }
};

// A panel of `vectors` vectors.
template <class T, int vectors>
struct Panel {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  using Move = Shuffle<T>;
  static constexpr std::int64_t width = vectors * S::width;

  static JACPOT_INLINE const T* row(const T* panel, std::int64_t index) {
    return panel + index * width;
  }

  static void pack(const Activations<const T>& from, std::int64_t example, std::int64_t first,
                   std::int64_t last, T* panel) {
    const std::int64_t left = from.examples - example, count = left < width ? left : width;
    const T* start = from.data + example * from.example_stride;
    std::int64_t f = first;
    if (from.feature_stride == 1) {
      for (; f + S::width <= last; f += S::width)
        for (std::int64_t n = 0; n < width; n += S::width) {
          Vec block[S::width];
          const T* corner = start + n * from.example_stride + f;
#pragma GCC unroll 16
          for (int i = 0; i < S::width; ++i) {
            const T* at = corner + i * from.example_stride;
            const bool inside = n + i < count;
            // Rows are far apart, so the hardware does not see the stream.
            if (inside) __builtin_prefetch(at + 4 * S::width);
            block[i] = inside ? S::load(at) : S::zero();
          }
          Move::transpose(block);
          T* target = panel + (f - first) * width + n;
#pragma GCC unroll 16
          for (int i = 0; i < S::width; ++i) S::store(target + i * width, block[i]);
        }
    }
    for (; f < last; ++f) {
      T* target = panel + (f - first) * width;
      const T* source = start + f * from.feature_stride;
      if (from.example_stride == 1 && count == width) {
        for (int v = 0; v < vectors; ++v)
          S::store(target + v * S::width, S::load(source + v * S::width));
      } else {
        for (std::int64_t n = 0; n < count; ++n) target[n] = source[n * from.example_stride];
        for (std::int64_t n = count; n < width; ++n) target[n] = 0;
      }
    }
  }

  static void unpack(const T* panel, std::int64_t example, std::int64_t first, std::int64_t last,
                     const Activations<T>& to) {
    const std::int64_t left = to.examples - example, count = left < width ? left : width;
    T* start = to.data + example * to.example_stride;
    std::int64_t f = first;
    if (to.feature_stride == 1) {
      for (; f + S::width <= last; f += S::width)
        for (std::int64_t n = 0; n < count; n += S::width) {
          Vec block[S::width];
          const T* source = panel + (f - first) * width + n;
#pragma GCC unroll 16
          for (int i = 0; i < S::width; ++i) block[i] = S::load(source + i * width);
          Move::transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < S::width; ++i)
            if (n + i < count) S::store(start + (n + i) * to.example_stride + f, block[i]);
        }
    }
    for (; f < last; ++f) {
      const T* source = panel + (f - first) * width;
      T* target = start + f * to.feature_stride;
      if (to.example_stride == 1 && count == width) {
        for (int v = 0; v < vectors; ++v)
          S::store(target + v * S::width, S::load(source + v * S::width));
      } else {
        for (std::int64_t n = 0; n < count; ++n) target[n * to.example_stride] = source[n];
      }
    }
  }

  static JACPOT_INLINE void fetch(const T* p) {
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(p + v * S::width, 1);
  }

  // The lines jump about in their part of the panel, so no hardware would fetch it ahead.
  static JACPOT_INLINE void fetch_tile(const Lines& lines, const Runs& runs, const T* panel) {
    const std::int64_t left = lines.length - runs.base;
    for (std::int64_t f = 0; f < (left < lines.span ? left : lines.span); ++f)
      fetch(panel + f * width);
  }

  static JACPOT_INLINE void add(Vec value, const T* at, Vec (&sum)[vectors]) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = S::fma(value, S::load(at + v * S::width), sum[v]);
  }

  // Entries i, i + 1... of a batch; `group` holds the values of the lane that i is in.
  template <int i = 0, int chains, class Batch>
  static JACPOT_INLINE void add_batch(const Batch& indices, const T* values, const T* panel,
                                      Vec (&sum)[chains][vectors], Vec group) {
    if constexpr (i < Batch::size) {
      if constexpr (i % Move::lane == 0) group = Move::spread(values + i);
      add(Move::template splat<i % Move::lane>(group), row(panel, indices.template get<i>()),
          sum[i % chains]);
      add_batch<i + 1>(indices, values, panel, sum, group);
    }
  }

  template <class Index>
  static void multiply_lines(const Tile& tile, const Index* indices, const T* values,
                             const T* panel, T* out) {
    // Eight chains of FMAs hide their latency, whatever the width.
    constexpr int chains = vectors < 8 ? 8 / vectors : 1,
                  batch = chains > Move::lane ? chains : Move::lane;
    const Runs runs(tile);
    const bool more = tile.tile > 0;
    panel += runs.base * width;
    fetch_tile(tile.lines, runs, panel);
    for (std::int64_t l = tile.first; l < tile.last; ++l, out += width) {
      fetch(out + 2 * width);
      Vec sum[chains][vectors] = {};
      std::int64_t e = runs.starts[l];
      const std::int64_t end = runs.starts[l + 1];
      for (; e + batch <= end; e += batch)
        add_batch(Batch<Index, batch>(indices + e), values + e, panel, sum, Vec{});
      for (; e < end; ++e) add(S::broadcast(values[e]), row(panel, indices[e]), sum[0]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        Vec total = sum[0][v];
#pragma GCC unroll 8
        for (int c = 1; c < chains; ++c) total += sum[c][v];
        T* at = out + v * S::width;
        S::store(at, more ? total + S::load(at) : total);
      }
    }
  }

  // One entry: value · panel row is added to `sum` when wanted, and ⟨x, panel row⟩ returned,
  // its lanes not yet added up.
  template <bool with_out>
  static JACPOT_INLINE Vec visit(Vec value, const T* at, const Vec (&x)[vectors],
                                 Vec (&sum)[vectors]) {
    Vec dot{};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Vec loaded = S::load(at + v * S::width);
      Move::keep(loaded);
      if constexpr (with_out) sum[v] = S::fma(value, loaded, sum[v]);
      dot = v == 0 ? x[v] * loaded : S::fma(x[v], loaded, dot);
    }
    return dot;
  }
  template <bool with_out, int i = 0, class Batch>
  static JACPOT_INLINE void visit_batch(const Batch& indices, Vec values, const T* panel,
                                        const Vec (&x)[vectors], Vec (&sum)[vectors],
                                        Vec (&dots)[Batch::size]) {
    if constexpr (i < Batch::size) {
      dots[i] = visit<with_out>(Move::template splat<i>(values),
                                row(panel, indices.template get<i>()), x, sum);
      visit_batch<with_out, i + 1>(indices, values, panel, x, sum, dots);
    }
  }

  // Both products of a tile, or the sampled one alone. `with_out` says whether `out` is wanted.
  template <bool with_out, class Index>
  static JACPOT_INLINE void walk(const Tile& tile, const Index* indices, const T* values,
                                 const T* panel, const T* x, T* out, T* d_values) {
    constexpr int batch = Move::lane;  // entries whose sums are taken together
    const Runs runs(tile);
    const bool more = tile.tile > 0;
    panel += runs.base * width;
    fetch_tile(tile.lines, runs, panel);
    for (std::int64_t l = tile.first; l < tile.last; ++l, x += width) {
      fetch(x + 2 * width);
      if constexpr (with_out) fetch(out + 2 * width);
      Vec held[vectors], sum[vectors] = {};
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) held[v] = S::load(x + v * S::width);
      std::int64_t e = runs.starts[l];
      const std::int64_t end = runs.starts[l + 1];
      for (; e + batch <= end; e += batch) {
        Vec dots[batch], group{};
        if constexpr (with_out) group = Move::spread(values + e);
        visit_batch<with_out>(Batch<Index, batch>(indices + e), group, panel, held, sum, dots);
        Move::add_sums(dots, d_values + e);
      }
      for (; e < end; ++e) {
        Vec value{};
        if constexpr (with_out) value = S::broadcast(values[e]);
        d_values[e] += Move::sum(visit<with_out>(value, row(panel, indices[e]), held, sum));
      }
      if constexpr (with_out) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          T* at = out + v * S::width;
          S::store(at, more ? sum[v] + S::load(at) : sum[v]);
        }
        out += width;
      }
    }
  }

  static void multiply(const Tile& tile, const T* values, const T* panel, T* out) {
    with_indices(tile.lines,
                 [&](const auto* indices) { multiply_lines(tile, indices, values, panel, out); });
  }
  static void sample(const Tile& tile, const T* panel, const T* x, T* d_values) {
    with_indices(tile.lines, [&](const auto* indices) {
      walk<false>(tile, indices, static_cast<const T*>(nullptr), panel, x, static_cast<T*>(nullptr),
                  d_values);
    });
  }
  static void fused(const Tile& tile, const T* values, const T* panel, const T* x, T* out,
                    T* d_values) {
    with_indices(tile.lines, [&](const auto* indices) {
      walk<true>(tile, indices, values, panel, x, out, d_values);
    });
  }

  static void finish(std::int64_t first, std::int64_t last, const T* bias, bool relu, T* out) {
    for (std::int64_t l = first; l < last; ++l, out += width) {
      const Vec add = bias ? S::broadcast(bias[l]) : S::zero();
      for (int v = 0; v < vectors; ++v) {
        Vec y = S::load(out + v * S::width) + add;
        if (relu) y = y < S::zero() ? S::zero() : y;  // a NaN stays one
        S::store(out + v * S::width, y);
      }
    }
  }

  static constexpr Shape<T> shape{width, pack, unpack, multiply, sample, fused, finish};
};

// A single example: the weight is read once and bounds the time, so entries are taken one by one.
template <class T>
struct Single {
  static void pack(const Activations<const T>& from, std::int64_t example, std::int64_t first,
                   std::int64_t last, T* panel) {
    const T* source = from.data + example * from.example_stride;
    for (std::int64_t f = first; f < last; ++f) panel[f - first] = source[f * from.feature_stride];
  }
  static void unpack(const T* panel, std::int64_t example, std::int64_t first, std::int64_t last,
                     const Activations<T>& to) {
    T* target = to.data + example * to.example_stride;
    for (std::int64_t f = first; f < last; ++f) target[f * to.feature_stride] = panel[f - first];
  }
  static void multiply(const Tile& tile, const T* values, const T* panel, T* out) {
    with_indices(tile.lines, [&](const auto* indices) {
      const Runs runs(tile);
      const T* start = panel + runs.base;
      for (std::int64_t l = tile.first; l < tile.last; ++l) {
        constexpr int chains = 8;
        T sum[chains] = {};
        std::int64_t e = runs.starts[l];
        const std::int64_t end = runs.starts[l + 1];
        for (; e + chains <= end; e += chains) {
          __builtin_prefetch(values + e + 512);
          __builtin_prefetch(indices + e + 1024);
#pragma GCC unroll 8
          for (int c = 0; c < chains; ++c) sum[c] += values[e + c] * start[indices[e + c]];
        }
        for (; e < end; ++e) sum[0] += values[e] * start[indices[e]];
        const T total =
            ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
        T& at = out[l - tile.first];
        at = tile.tile > 0 ? at + total : total;
      }
    });
  }
  static void sample(const Tile& tile, const T* panel, const T* x, T* d_values) {
    with_indices(tile.lines, [&](const auto* indices) {
      const Runs runs(tile);
      for (std::int64_t l = tile.first; l < tile.last; ++l)
        for (std::int64_t e = runs.starts[l]; e < runs.starts[l + 1]; ++e)
          d_values[e] += x[l - tile.first] * panel[runs.base + indices[e]];
    });
  }
  static void fused(const Tile& tile, const T* values, const T* panel, const T* x, T* out,
                    T* d_values) {
    multiply(tile, values, panel, out);
    sample(tile, panel, x, d_values);
  }
  static void finish(std::int64_t first, std::int64_t last, const T* bias, bool relu, T* out) {
    for (std::int64_t l = first; l < last; ++l, ++out) {
      if (bias) *out += bias[l];
      if (relu && *out < 0) *out = 0;
    }
  }
  static constexpr Shape<T> shape{1, pack, unpack, multiply, sample, fused, finish};
};

// Forward, four vectors of 64 bytes are best: with eight the tiles get too narrow. The backward
// walk holds two accumulators for each vector: eight need the 32 registers of AVX-512.
constexpr bool many_registers = JACPOT_VECTOR_BYTES >= 64;

template <class T>
constexpr Kernels<T> kernels{{Single<T>::shape, Panel<T, 1>::shape, Panel<T, 2>::shape,
                              Panel<T, 4>::shape, Panel<T, 8>::shape},
                             4,
                             many_registers ? 5 : 4};

}  // namespace

const MaskedMatmulTable& table(const MaskedMatmulTable*) {
  static constexpr MaskedMatmulTable all{kernels<float>, kernels<double>};
  return all;
}

}  // namespace jacpot::JACPOT_ISA
