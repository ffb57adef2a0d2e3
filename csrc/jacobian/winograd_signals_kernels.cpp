#include "jacobian/winograd_signals.hpp"
#include "jacobian/winograd_tiles.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

template <class T>
struct WinogradSignals : WinogradTiles<T> {
  using Tiles = WinogradTiles<T>;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Layer = ConvolutionSignals<T>;
  using Tiles::blocks, Tiles::kernel, Tiles::lanes, Tiles::pad, Tiles::points, Tiles::side,
      Tiles::turn, Tiles::window;
  static constexpr int together = 2;  // vectors of inputs that are done at a time
  static constexpr int columns = together * lanes;

  static std::int64_t tiles_at_once(const Layer& l) {
    return l.images_at_once() * l.rows_at_once() * l.tiles_across();
  }
  static std::int64_t signals_step(const Layer& l) {
    return blocks(l.outputs) * tiles_at_once(l) * lanes + pad;
  }
  static std::int64_t sums_step(const Layer& l) { return tiles_at_once(l) * columns + pad; }
  static std::int64_t panels(const Layer& l) { return (l.inputs + columns - 1) / columns; }
  static std::int64_t weight_step(const Layer& l) { return panels(l) * l.outputs * columns + pad; }

  static std::int64_t weight_size(const Layer& l) { return points * weight_step(l); }
  static std::int64_t turned_size(const Layer& l) {
    const std::int64_t rows = l.rows_at_once() * side;
    const std::int64_t seen = (rows + 2) * l.signals_width, made = rows * l.width;
    return (seen > made ? seen : made) * lanes;
  }
  static std::int64_t scratch_size(const Layer& l) {
    return turned_size(l) + points * (signals_step(l) + sums_step(l));
  }

  // G w
  static JACPOT_INLINE void transform_line(const Vec (&w)[3], Vec (&to)[window]) {
    const Vec a = (w[0] + w[2]) * T(-1.0 / 6), b = w[1] * T(-1.0 / 6),
              c = w[0] * T(1.0 / 24) + w[2] * T(1.0 / 6), d = w[1] * T(1.0 / 12);
    to[0] = T(0.25) * w[0];
    to[1] = a + b;
    to[2] = a - b;
    to[3] = c + d;
    to[4] = c - d;
    to[5] = w[2];
  }
  // Aᵀ m
  static JACPOT_INLINE void transform_sums(const Vec (&m)[window], Vec (&to)[side]) {
    const Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    to[0] = m[0] + a + c;
    to[1] = b + T(2) * d;
    to[2] = a + T(4) * c;
    to[3] = b + T(8) * d + m[5];
  }

  // to [point][panel][o][column], columns being inputs, of kernels turned around
  static void transform_weight(const Layer& l, std::int64_t o, T* to) {
    const std::int64_t step = weight_step(l);
    for (std::int64_t i = 0; i < panels(l) * columns; i += lanes) {
      Vec turned[kernel];
      for (int e = 0; e < kernel; ++e) {
        T lane[lanes];
        for (int j = 0; j < lanes; ++j)
          lane[j] = i + j < l.inputs ? l.weight[(o * l.inputs + i + j) * kernel + e] : T(0);
        turned[kernel - 1 - e] = V::load(lane);
      }
      Vec half[window][3];
      for (int j = 0; j < 3; ++j) {
        Vec line[window];
        const Vec from[3] = {turned[j], turned[3 + j], turned[6 + j]};
        transform_line(from, line);
        for (int y = 0; y < window; ++y) half[y][j] = line[y];
      }
      T* place = to + (i / columns * l.outputs + o) * columns + i % columns;
      for (int y = 0; y < window; ++y) {
        Vec line[window];
        transform_line(half[y], line);
        for (int x = 0; x < window; ++x) V::store(place + (y * window + x) * step, line[x]);
      }
    }
  }

  // to [point][block of outputs][tile][lane]
  static void transform_signals(const Layer& l, TileRange range, T* turned, T* to) {
    const std::int64_t above = l.height + 2 - l.signals_height,  // 2 (2 - pad)
        top = range.first_row * side - above / 2, left = -(l.width + 2 - l.signals_width) / 2,
                       bottom = top + range.rows * side + 2, first = top < 0 ? 0 : top,
                       last = bottom < l.signals_height ? bottom : l.signals_height,
                       plane = l.signals_height * l.signals_width, block = tiles_at_once(l) * lanes,
                       step = signals_step(l);
    for (std::int64_t image = 0; image < range.images; ++image) {
      const std::int64_t at = range.first_image + image;
      const T* from = l.signals + at / l.k * l.signals_example + at % l.k * l.signals_output;
      T* own = to + image * range.rows * l.tiles_across() * lanes;
      for (std::int64_t o = 0; o < l.outputs; o += lanes, own += block) {
        if (last > first)
          turn(from + o * plane + first * l.signals_width, plane, l.outputs - o,
               (last - first) * l.signals_width, turned);
        T* tile = own;
        for (std::int64_t y = 0; y < range.rows; ++y)
          for (std::int64_t x = 0; x < l.tiles_across(); ++x, tile += lanes)
            Tiles::template transform_tile<window, Tiles::transform_window>(
                turned, last - first, l.signals_width, top - first + y * side, left + x * side,
                tile, step);
      }
    }
  }

  // sums (R, columns) = signals (R tiles, O) · weight (O, columns)
  template <int R>
  static JACPOT_INLINE void multiply(const T* signals, std::int64_t block, std::int64_t outputs,
                                     const T* weight, T* sums) {
    Vec acc[R][together];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < together; ++j) acc[r][j] = V::zero();
    for (std::int64_t o = 0; o < outputs; o += lanes, signals += block) {
      const int count = static_cast<int>(outputs - o < lanes ? outputs - o : lanes);
      for (int c = 0; c < count; ++c, weight += columns) {
        Vec w[together];
#pragma GCC unroll 2
        for (int j = 0; j < together; ++j) w[j] = V::load(weight + j * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec s = V::broadcast(signals[r * lanes + c]);
#pragma GCC unroll 2
          for (int j = 0; j < together; ++j) acc[r][j] = V::fma(s, w[j], acc[r][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < together; ++j) V::store(sums + r * columns + j * lanes, acc[r][j]);
  }

  static void multiply_tiles(const Layer& l, const T* signals, std::int64_t tiles, const T* weight,
                             T* sums) {
    constexpr int most = JACPOT_VECTOR_BYTES == 64 ? 8 : 4;
    const std::int64_t block = tiles_at_once(l) * lanes;
    std::int64_t t = 0;
    for (; t + most <= tiles; t += most)
      multiply<most>(signals + t * lanes, block, l.outputs, weight, sums + t * columns);
    for (; t < tiles; ++t)
      multiply<1>(signals + t * lanes, block, l.outputs, weight, sums + t * columns);
  }

  // turned [place][lane] at (y, x), which must lie in (height, width), from a tile's 36 sums
  static JACPOT_INLINE void finish_tile(const T* sums, std::int64_t step, std::int64_t height,
                                        std::int64_t width, std::int64_t y, std::int64_t x,
                                        T* turned) {
    Vec half[side][window];
#pragma GCC unroll 6
    for (int j = 0; j < window; ++j) {
      Vec line[window], out[side];
#pragma GCC unroll 6
      for (int i = 0; i < window; ++i) line[i] = V::load(sums + (i * window + j) * step);
      transform_sums(line, out);
#pragma GCC unroll 4
      for (int i = 0; i < side; ++i) half[i][j] = out[i];
    }
    for (int i = 0; i < side && y + i < height; ++i) {
      Vec out[side];
      transform_sums(half[i], out);
      T* to = turned + ((y + i) * width + x) * lanes;
      if (x + side <= width) {
#pragma GCC unroll 4
        for (int j = 0; j < side; ++j) V::store(to + j * lanes, out[j]);
      } else {
        for (int j = 0; x + j < width; ++j) V::store(to + j * lanes, out[j]);
      }
    }
  }

  // Zero where a ReLU was off, in planes (channels, size), `apart`.
  static void mask(const T* seen, std::int64_t apart, std::int64_t channels, std::int64_t size,
                   T* to) {
    for (std::int64_t c = 0; c < channels; ++c, seen += apart, to += apart)
      for (std::int64_t e = 0; e < size; ++e) to[e] = seen[e] <= T(0) ? T(0) : to[e];
  }

  static void finish(const Layer& l, TileRange range, std::int64_t first_input, const T* sums,
                     T* turned) {
    const std::int64_t top = range.first_row * side, rest = l.height - top,
                       height = rest < range.rows * side ? rest : range.rows * side,
                       plane = l.height * l.width;
    for (std::int64_t image = 0; image < range.images; ++image) {
      T* to = l.out + ((range.first_image + image) * l.inputs) * plane + top * l.width;
      const T* own = sums + image * range.rows * l.tiles_across() * columns;
      for (int j = 0; j < together; ++j) {
        const std::int64_t i = first_input + j * lanes, count = l.inputs - i;
        if (count <= 0) break;
        const T* tile = own + j * lanes;
        for (std::int64_t y = 0; y < range.rows; ++y)
          for (std::int64_t x = 0; x < l.tiles_across(); ++x, tile += columns)
            finish_tile(tile, sums_step(l), height, l.width, y * side, x * side, turned);
        transpose(turned, lanes, height * l.width, count < lanes ? count : lanes, to + i * plane,
                  plane);
        if (l.seen != nullptr)
          mask(l.seen + ((range.first_image + image) / l.k * l.inputs + i) * plane + top * l.width,
               plane, count < lanes ? count : lanes, height * l.width, to + i * plane);
      }
    }
  }

  static void pull_back(const Layer& l, const T* weight, TileRange range, T* scratch) {
    T* turned = scratch;
    T* signals = turned + turned_size(l);
    T* sums = signals + points * signals_step(l);
    const std::int64_t tiles = range.images * range.rows * l.tiles_across();
    transform_signals(l, range, turned, signals);
    for (std::int64_t panel = 0; panel < panels(l); ++panel) {
      for (int p = 0; p < points; ++p)
        multiply_tiles(l, signals + p * signals_step(l), tiles,
                       weight + p * weight_step(l) + panel * l.outputs * columns,
                       sums + p * sums_step(l));
      finish(l, range, panel * columns, sums, turned);
    }
  }

  static constexpr WinogradSignalsKernels<T> table() {
    return {&weight_size, &scratch_size, &transform_weight, &pull_back};
  }
};

constexpr WinogradSignalsTable winograd_signals_table{WinogradSignals<float>::table(),
                                                      WinogradSignals<double>::table()};

}  // namespace

const WinogradSignalsTable& table(const WinogradSignalsTable*) { return winograd_signals_table; }

}  // namespace jacpot::JACPOT_ISA
