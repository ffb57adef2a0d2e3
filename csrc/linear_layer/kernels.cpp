#include "linear_layer/kernels.hpp"

#include "common/register_tile.hpp"
#include "common/shuffle.hpp"
#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

template <class T>
struct LinearLayer {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr int width = V::width;
  // Tiles of accumulators that leave registers, of 32 or 16, for what they are made of.
  static constexpr bool many = JACPOT_VECTOR_BYTES == 64;
  static constexpr int examples = many ? 4 : 2, outputs = many ? 6 : 4;
  static constexpr int signals = many ? 8 : 4, vectors = 3;
  // Two tiles wide: rows of W lie on pages of their own, and to find a page takes longer than to
  // read from it.
  static constexpr int tile_width = vectors * width, panel_width = 2 * tile_width;

  static JACPOT_INLINE Vec load_part(const T* p, std::int64_t left) {
    if (left >= width) return V::load(p);
    return left > 0 ? V::load_first(p, left) : V::zero();
  }
  static JACPOT_INLINE void store_part(T* p, Vec v, std::int64_t left) {
    if (left >= width)
      V::store(p, v);
    else if (left > 0)
      V::store_first(p, v, left);
  }

  static void pack(const T* x, std::int64_t stride, std::int64_t n, std::int64_t inputs,
                   T* packed) {
    for (std::int64_t tile = 0; tile < n; tile += examples)
      for (std::int64_t i = 0; i < inputs; i += width)
        for (std::int64_t e = tile; e < tile + examples; ++e, packed += width)
          V::store(packed, e < n ? load_part(x + e * stride + i, inputs - i) : V::zero());
  }

  // Dots of `count` <= outputs rows. What comes after them, unless it is null, is fetched
  // meanwhile, the same share of it in each tile of examples: only the first tile waits for memory,
  // the others find the rows in cache.
  static void dots_of(const T* packed, std::int64_t n, std::int64_t inputs, const T* w,
                      std::int64_t w_stride, std::int64_t count, const T* next, const T* bias, T* y,
                      std::int64_t y_stride) {
    constexpr int line = 64 / static_cast<int>(sizeof(T));
    const std::int64_t tiles = (n + examples - 1) / examples;
    const T* row[outputs];  // those beyond the last repeat it
    for (int o = 0; o < outputs; ++o) row[o] = w + (o < count ? o : count - 1) * w_stride;
    for (std::int64_t tile = 0; tile < n; tile += examples) {
      Vec acc[examples][outputs];
#pragma GCC unroll 4
      for (int e = 0; e < examples; ++e)
#pragma GCC unroll 6
        for (int o = 0; o < outputs; ++o) acc[e][o] = V::zero();
      const auto step = [&](const Vec(&b)[outputs]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int e = 0; e < examples; ++e, packed += width) {
          const Vec a = V::load(packed);
#pragma GCC unroll 6
          for (int o = 0; o < outputs; ++o) acc[e][o] = V::fma(a, b[o], acc[e][o]);
        }
      };
      const std::int64_t begin = next ? tile / examples * outputs / tiles : 0;
      const std::int64_t end = next ? (tile / examples + 1) * outputs / tiles : 0;
      std::int64_t i = 0;
      for (; i + width <= inputs; i += width) {
        if (width == line || i % line == 0)
          for (std::int64_t o = begin; o < end; ++o)
            __builtin_prefetch(next + o * w_stride + i, 0, 2);
        Vec b[outputs];
#pragma GCC unroll 6
        for (int o = 0; o < outputs; ++o) b[o] = V::load(row[o] + i);
        step(b);
      }
      if (i < inputs) {
        Vec b[outputs];
#pragma GCC unroll 6
        for (int o = 0; o < outputs; ++o) b[o] = V::load_first(row[o] + i, inputs - i);
        step(b);
      }
#pragma GCC unroll 4
      for (int e = 0; e < examples; ++e)
#pragma GCC unroll 6
        for (int o = 0; o < outputs; ++o)
          if (tile + e < n && o < count)
            y[(tile + e) * y_stride + o] = Shuffle<T>::sum(acc[e][o]) + (bias ? bias[o] : T(0));
    }
  }

  static void dots(const T* packed, std::int64_t n, std::int64_t inputs, const T* w,
                   std::int64_t w_stride, std::int64_t count, const T* bias, T* y,
                   std::int64_t y_stride) {
    for (std::int64_t o = 0; o < count; o += outputs) {
      const std::int64_t left = count - o;
      const T* const next = left >= 2 * outputs ? w + (o + outputs) * w_stride : nullptr;
      dots_of(packed, n, inputs, w + o * w_stride, w_stride, left < outputs ? left : outputs, next,
              bias ? bias + o : nullptr, y + o, y_stride);
    }
  }

  static bool copy(const T* w, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                   T* panel) {
    Vec difference = V::zero();
    for (std::int64_t o = 0; o < rows; ++o, w += stride)
#pragma GCC unroll 6
      for (int j = 0; j < 2 * vectors; ++j, panel += width) {
        const Vec v = load_part(w + j * width, columns - j * width);
        difference += v - v;  // inf - inf is nan
        V::store(panel, v);
      }
    return Shuffle<T>::sum(difference) == 0;
  }

  template <int R>
  static void add_tile(const std::int32_t* rows, const T* values, std::int64_t count,
                       std::int64_t k, const T* panel, std::int64_t columns, bool first, T* out,
                       std::int64_t stride) {
    RegisterTile<T, R, vectors> tile;
    if (!first)
      tile.each([=](Vec& sum, int q, int j) {
        sum = load_part(out + q * stride + j * width, columns - j * width);
      });
    tile.add(values, k, panel, panel_width, rows, count);
    tile.each([=](Vec sum, int q, int j) {
      store_part(out + q * stride + j * width, sum, columns - j * width);
    });
  }

  static void add_rows(const std::int32_t* rows, const T* values, std::int64_t count,
                       std::int64_t k, const T* panel, std::int64_t columns, bool first, T* out,
                       std::int64_t stride) {
    const std::int64_t parts = (k + signals - 1) / signals;
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t q = part * k / parts, size = (part + 1) * k / parts - q;
      for (std::int64_t i = 0; i < columns; i += tile_width)
        with_count<signals>(size, [&](auto r) {
          add_tile<r.value>(rows, values + q, count, k, panel + i, columns - i, first,
                            out + q * stride + i, stride);
        });
    }
  }

  static constexpr LinearLayerKernels<T> kernels() {
    return {width, examples, &pack, outputs, &dots, panel_width, &copy, &add_rows};
  }
};

constexpr LinearLayerTable linear_layer_table{LinearLayer<float>::kernels(),
                                              LinearLayer<double>::kernels()};

}  // namespace

const LinearLayerTable& table(const LinearLayerTable*) { return linear_layer_table; }

}  // namespace jacpot::JACPOT_ISA
