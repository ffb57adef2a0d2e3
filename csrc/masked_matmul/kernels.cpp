#include "masked_matmul/kernels.hpp"

#include "common/simd.hpp"
#include "masked_matmul/shuffle.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

using masked_matmul::Activations;
using masked_matmul::Kernels;
using masked_matmul::Lines;
using masked_matmul::Shape;
using masked_matmul::Tile;

// Where the entries of the tile's lines begin and end.
struct Entries {
  const std::int32_t* begin;
  const std::int32_t* end;

  explicit Entries(const Tile& tile)
      : begin(tile.lines.grid + tile.begin * tile.lines.lines),
        end(tile.lines.grid + tile.end * tile.lines.lines) {}
};

// Calls the body with the indices in their type.
template <class F>
JACPOT_INLINE void with_indices(const Lines& lines, F&& body) {
  if (lines.index_bytes == 2)
    body(static_cast<const std::uint16_t*>(lines.indices));
  else
    body(static_cast<const std::int32_t*>(lines.indices));
}

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

  template <class Index>
  static void multiply_lines(const Tile& tile, const Index* indices, const T* values,
                             const T* panel, T* out) {
    // Eight chains of FMAs hide their latency, whatever the width.
    constexpr int chains = 8 / vectors;
    const Entries entries(tile);
    const bool add = tile.begin > 0;
    for (std::int64_t l = tile.first; l < tile.last; ++l, out += width) {
      fetch(out + 2 * width);
      const std::int64_t ahead = l + 8 < tile.last ? entries.begin[l + 8] : 0;
      __builtin_prefetch(values + ahead);
      __builtin_prefetch(values + ahead + 16);
      __builtin_prefetch(indices + ahead);
      Vec sum[chains][vectors] = {};
      std::int64_t e = entries.begin[l];
      const std::int64_t end = entries.end[l];
      for (; e + chains <= end; e += chains) {
#pragma GCC unroll 8
        for (int c = 0; c < chains; ++c) {
          const T* at = row(panel, indices[e + c]);
          const Vec value = S::broadcast(values[e + c]);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v)
            sum[c][v] = S::fma(value, S::load(at + v * S::width), sum[c][v]);
        }
      }
      for (; e < end; ++e) {
        const T* at = row(panel, indices[e]);
        const Vec value = S::broadcast(values[e]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
          sum[0][v] = S::fma(value, S::load(at + v * S::width), sum[0][v]);
      }
#pragma GCC unroll 8
      for (int half = chains / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int c = 0; c < half; ++c)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[c][v] += sum[c + half][v];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        T* at = out + v * S::width;
        S::store(at, add ? sum[0][v] + S::load(at) : sum[0][v]);
      }
    }
  }

  // The walk of `fused` and `sample`, which differ in whether `out` is wanted.
  template <bool with_out, class Index>
  static JACPOT_INLINE void walk(const Tile& tile, const Index* indices, const T* values,
                                 const T* panel, const T* x, T* out, T* d_values) {
    constexpr int batch = Move::lane;  // entries whose sums are taken together
    const Entries entries(tile);
    const bool add = tile.begin > 0;
    for (std::int64_t l = tile.first; l < tile.last; ++l, x += width) {
      Vec held[vectors], sum[vectors] = {};
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) held[v] = S::load(x + v * S::width);
      const auto visit = [&](std::int64_t e) __attribute__((always_inline)) {
        const T* at = row(panel, indices[e]);
        Vec value{}, dot{};
        if constexpr (with_out) value = S::broadcast(values[e]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          Vec loaded = S::load(at + v * S::width);
          Move::keep(loaded);
          if constexpr (with_out) sum[v] = S::fma(value, loaded, sum[v]);
          dot = v == 0 ? held[v] * loaded : S::fma(held[v], loaded, dot);
        }
        return dot;
      };
      std::int64_t e = entries.begin[l];
      const std::int64_t end = entries.end[l];
      for (; e + batch <= end; e += batch) {
        Vec dots[batch];
#pragma GCC unroll 8
        for (int b = 0; b < batch; ++b) dots[b] = visit(e + b);
        Move::add_sums(dots, d_values + e);
      }
      for (; e < end; ++e) d_values[e] += Move::sum(visit(e));
      if constexpr (with_out) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          T* at = out + v * S::width;
          S::store(at, add ? sum[v] + S::load(at) : sum[v]);
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
      const Entries entries(tile);
      for (std::int64_t l = tile.first; l < tile.last; ++l) {
        constexpr int chains = 8;
        T sum[chains] = {};
        std::int64_t e = entries.begin[l];
        const std::int64_t end = entries.end[l];
        for (; e + chains <= end; e += chains)
#pragma GCC unroll 8
          for (int c = 0; c < chains; ++c) sum[c] += values[e + c] * panel[indices[e + c]];
        for (; e < end; ++e) sum[0] += values[e] * panel[indices[e]];
        const T total =
            ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
        T& at = out[l - tile.first];
        at = tile.begin > 0 ? at + total : total;
      }
    });
  }
  static void sample(const Tile& tile, const T* panel, const T* x, T* d_values) {
    with_indices(tile.lines, [&](const auto* indices) {
      const Entries entries(tile);
      for (std::int64_t l = tile.first; l < tile.last; ++l)
        for (std::int64_t e = entries.begin[l]; e < entries.end[l]; ++e)
          d_values[e] += x[l - tile.first] * panel[indices[e]];
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

template <class T>
constexpr Kernels<T> kernels{
    {Single<T>::shape, Panel<T, 1>::shape, Panel<T, 2>::shape, Panel<T, 4>::shape}};

}  // namespace

const MaskedMatmulKernels& table(const MaskedMatmulKernels*) {
  static constexpr MaskedMatmulKernels all{kernels<float>, kernels<double>};
  return all;
}

}  // namespace jacpot::JACPOT_ISA
