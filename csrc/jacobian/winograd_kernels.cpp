#include "jacobian/winograd.hpp"
#include "jacobian/winograd_tiles.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

template <class T>
struct Winograd : WinogradTiles<T> {
  using Tiles = WinogradTiles<T>;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Layer = ConvolutionLayer<T>;
  using Tiles::blocks, Tiles::kernel, Tiles::lanes, Tiles::pad, Tiles::points, Tiles::side,
      Tiles::turn, Tiles::window;
  static constexpr int together = 4;  // blocks of inputs that are done at a time, if
  static constexpr std::int64_t chunk_bytes = 320 << 10;  // they stay in the L2 cache

  static std::int64_t block_size(const Layer& l) { return l.tiles() * lanes; }
  static std::int64_t chunk(const Layer& l) {
    const std::int64_t bytes = points * block_size(l) * std::int64_t{sizeof(T)};
    const std::int64_t few = bytes ? chunk_bytes / bytes : together;
    return lanes * (few < 1 ? 1 : few < together ? few : together);
  }
  static std::int64_t activations_step(const Layer& l) { return chunk(l) * l.tiles() + pad; }
  static std::int64_t signals_step(const Layer& l) { return block_size(l) + pad; }
  static constexpr std::int64_t products_step = lanes * together * lanes + pad;

  static std::int64_t activations_size(const Layer& l) { return points * activations_step(l); }
  static std::int64_t scratch_size(const Layer& l) {
    return (l.height + 2) * (l.width + 2) * lanes + points * signals_step(l) +
           points * products_step;
  }

  // G δ without its divisors, which wait for the sum over tiles
  static JACPOT_INLINE void transform_signals(const Vec (&x)[side], Vec (&to)[window]) {
    const Vec a = x[0] + x[2], b = x[1] + x[3], c = x[0] + T(4) * x[2],
              d = T(2) * x[1] + T(8) * x[3];
    to[0] = x[0];
    to[1] = a + b;
    to[2] = a - b;
    to[3] = c + d;
    to[4] = c - d;
    to[5] = x[3];
  }
  // Aᵀ m, divided by 4, -6, -6, 24, 24 and 1
  static JACPOT_INLINE void transform_products(const Vec (&m)[window], Vec (&to)[3]) {
    const Vec a = (m[1] + m[2]) * T(-1.0 / 6), b = (m[1] - m[2]) * T(-1.0 / 6),
              c = (m[3] + m[4]) * T(1.0 / 24), d = (m[3] - m[4]) * T(1.0 / 24);
    to[0] = T(0.25) * m[0] + a + c;
    to[1] = b + T(2) * d;
    to[2] = a + T(4) * c + m[5];
  }

  // Transforms all tiles of Size x Size, `side` apart, of turned planes (height, width, lane).
  template <int Size, void (*Line)(const Vec (&)[Size], Vec (&)[window])>
  static void transform_tiles(const Layer& l, const T* turned, std::int64_t height,
                              std::int64_t width, T* to, std::int64_t step) {
    for (std::int64_t y = 0; y < l.height; y += side)
      for (std::int64_t x = 0; x < l.width; x += side, to += lanes)
        Tiles::template transform_tile<Size, Line>(turned, height, width, y, x, to, step);
  }

  static void transform(const Layer& l, const T* a, std::int64_t inputs, T* to, T* scratch) {
    const std::int64_t height = l.height + 2, width = l.width + 2, size = height * width;
    for (std::int64_t c = 0; c < inputs; c += lanes, to += block_size(l)) {
      turn(a + c * size, size, inputs - c, size, scratch);
      transform_tiles<window, Tiles::transform_window>(l, scratch, height, width, to,
                                                       activations_step(l));
    }
  }

  // out (R, Vectors·lanes) = Σ_tiles signals[tile][R] ⊗ activations[vector][tile]
  template <int R, int Vectors>
  static JACPOT_INLINE void multiply(const T* signals, const T* activations, std::int64_t tiles,
                                     T* out) {
    Vec acc[R][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) acc[r][j] = V::zero();
    for (std::int64_t t = 0; t < tiles; ++t) {
      Vec a[Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) a[j] = V::load(activations + (j * tiles + t) * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec b = V::broadcast(signals[t * lanes + r]);
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) acc[r][j] = V::fma(b, a[j], acc[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) V::store(out + r * together * lanes + j * lanes, acc[r][j]);
  }

  // products (lanes of outputs, together · lanes of inputs) of one point
  static void products(const T* signals, const T* activations, std::int64_t tiles,
                       std::int64_t count, T* out) {
    constexpr int wanted = JACPOT_VECTOR_BYTES == 64 ? 8 : 4,
                  rows = lanes < wanted ? lanes : wanted;
    for (std::int64_t b = 0; b < count; b += 2)
      for (int o = 0; o < lanes; o += rows) {
        T* to = out + o * together * lanes + b * lanes;
        const T* a = activations + b * tiles * lanes;
        if (b + 2 <= count)
          multiply<rows, 2>(signals + o, a, tiles, to);
        else
          multiply<rows, 1>(signals + o, a, tiles, to);
      }
  }

  // to (count, 3, 3) from the 36 products of one output with a block of inputs
  static void finish(const T* from, std::int64_t count, T* to) {
    Vec half[3][window];
#pragma GCC unroll 6
    for (int j = 0; j < window; ++j) {
      Vec line[window], out[3];
#pragma GCC unroll 6
      for (int i = 0; i < window; ++i) line[i] = V::load(from + (i * window + j) * products_step);
      transform_products(line, out);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) half[i][j] = out[i];
    }
    T turned[kernel * lanes];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      Vec out[3];
      transform_products(half[i], out);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) V::store(turned + (i * 3 + j) * lanes, out[j]);
    }
    if constexpr (lanes >= kernel) {
      if (count == lanes) {  // a whole vector for each input, over what the one before had too much
        const T* lines[lanes];
        for (int e = 0; e < lanes; ++e) lines[e] = turned + (e < kernel ? e : 0) * lanes;
        T rows[kernel * lanes + lanes];
        transpose_block<T>(lines, rows, kernel);
        __builtin_memcpy(to, rows, sizeof turned);
        return;
      }
    }
    for (std::int64_t c = 0; c < count; ++c)
#pragma GCC unroll 9
      for (int e = 0; e < kernel; ++e) to[c * kernel + e] = turned[e * lanes + c];
  }

  static void row(const Layer& l, const T* signals, const T* transformed, std::int64_t inputs,
                  T* out, T* scratch) {
    T* turned = scratch;
    T* own = turned + (l.height + 2) * (l.width + 2) * lanes;
    T* sums = own + points * signals_step(l);
    const std::int64_t places = l.height * l.width, count = blocks(inputs);
    for (std::int64_t o = 0; o < l.outputs; o += lanes) {
      turn(signals + o * places, places, l.outputs - o, places, turned);
      transform_tiles<side, transform_signals>(l, turned, l.height, l.width, own, signals_step(l));
      for (int p = 0; p < points; ++p)
        products(own + p * signals_step(l), transformed + p * activations_step(l), l.tiles(), count,
                 sums + p * products_step);
      for (std::int64_t r = 0; r < lanes && o + r < l.outputs; ++r)
        for (std::int64_t c = 0; c < inputs; c += lanes)
          finish(sums + r * together * lanes + c, inputs - c < lanes ? inputs - c : lanes,
                 out + ((o + r) * l.inputs + c) * kernel);
    }
  }

  static constexpr WinogradKernels<T> table() {
    return {&chunk, &activations_size, &scratch_size, &transform, &row};
  }
};

constexpr WinogradTable winograd_table{Winograd<float>::table(), Winograd<double>::table()};

}  // namespace

const WinogradTable& table(const WinogradTable*) { return winograd_table; }

}  // namespace jacpot::JACPOT_ISA
