#include "jacobian/plain_signals.hpp"
#include "jacobian/transpose.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

struct Range {
  std::int64_t first, last;
};

template <class T>
struct Plain {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Layer = PlainSignals<T>;
  static constexpr int lanes = V::width;
  static constexpr int together = 2;  // vectors of inputs that are done at a time
  static constexpr int columns = together * lanes;
  static constexpr int most = JACPOT_VECTOR_BYTES == 64 ? 8 : 4;  // and places of signals
  static constexpr std::int64_t pad = 64 / sizeof(T);  // places must not share a cache set

  static std::int64_t step(const Layer& l) { return l.outputs + pad; }
  static std::int64_t sums_size(const Layer& l) {
    return l.rows_at_once(columns) * l.size[1] * columns;
  }
  static std::int64_t scratch_size(const Layer& l) {
    return sums_size(l) + l.places[0] * l.places[1] * step(l);
  }

  static void turn_weight(const Layer& l, std::int64_t panel, T* to) {
    const std::int64_t first = panel * columns, rest = l.inputs - first,
                       count = rest < columns ? rest : columns;
    for (std::int64_t o = 0; o < l.outputs; ++o)
      for (std::int64_t tap = 0; tap < l.taps(); ++tap) {
        const T* from = l.weight + (o * l.inputs + first) * l.taps() + tap;
        T* own = to + (tap * l.outputs + o) * columns;
        for (std::int64_t c = 0; c < columns; ++c) own[c] = c < count ? from[c * l.taps()] : T(0);
      }
  }

  // The places along an axis whose tap d meets the elements from `first` up to `last`.
  static Range meeting(const Layer& l, int axis, std::int64_t d, std::int64_t first,
                       std::int64_t last) {
    const std::int64_t s = l.stride[axis], at = d * l.dilation[axis] - l.padding[axis];
    const std::int64_t low = first > at ? (first - at + s - 1) / s : 0,
                       high = last > at ? (last - at + s - 1) / s : 0;
    return {low, high < l.places[axis] ? high : l.places[axis]};
  }

  // sums (R places, Vectors · lanes) += signals (R, O) · weight (O, columns)
  template <int R, int Vectors>
  static JACPOT_INLINE void multiply(const T* signals, std::int64_t signals_step,
                                     std::int64_t outputs, const T* weight, T* sums,
                                     std::int64_t sums_step) {
    Vec acc[R][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) acc[r][j] = V::load(sums + r * sums_step + j * lanes);
    for (std::int64_t o = 0; o < outputs; ++o, weight += columns) {
      Vec w[Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) w[j] = V::load(weight + j * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec s = V::broadcast(signals[r * signals_step + o]);
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) acc[r][j] = V::fma(s, w[j], acc[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) V::store(sums + r * sums_step + j * lanes, acc[r][j]);
  }

  template <int R, int Vectors>
  static void multiply_of(std::int64_t count, const T* signals, std::int64_t signals_step,
                          std::int64_t outputs, const T* weight, T* sums, std::int64_t sums_step) {
    if (count == R)
      multiply<R, Vectors>(signals, signals_step, outputs, weight, sums, sums_step);
    else if constexpr (R > 1)
      multiply_of<R - 1, Vectors>(count, signals, signals_step, outputs, weight, sums, sums_step);
  }

  // What signals [place][o] add to the sums [place][column] of rows from `top` on.
  template <int Vectors>
  static void add_taps(const Layer& l, const T* signals, const T* weight, std::int64_t top,
                       std::int64_t rows, T* sums) {
    for (std::int64_t dy = 0; dy < l.kernel[0]; ++dy) {
      const Range down = meeting(l, 0, dy, top, top + rows);
      for (std::int64_t dx = 0; dx < l.kernel[1]; ++dx, weight += l.outputs * columns) {
        const Range across = meeting(l, 1, dx, 0, l.size[1]);
        const std::int64_t width = across.last - across.first, parts = (width + most - 1) / most;
        for (std::int64_t oy = down.first; oy < down.last; ++oy)
          for (std::int64_t part = 0; part < parts; ++part) {  // as even as can be
            const std::int64_t begin = part * width / parts, end = (part + 1) * width / parts;
            const std::int64_t ox = across.first + begin,
                               y = oy * l.stride[0] + dy * l.dilation[0] - l.padding[0] - top,
                               x = ox * l.stride[1] + dx * l.dilation[1] - l.padding[1];
            multiply_of<most, Vectors>(end - begin, signals + (oy * l.places[1] + ox) * step(l),
                                       step(l), l.outputs, weight,
                                       sums + (y * l.size[1] + x) * columns, l.stride[1] * columns);
          }
      }
    }
  }

  static void pull_back(const Layer& l, const T* weight, std::int64_t image, std::int64_t top,
                        std::int64_t rows, T* scratch) {
    T* sums = scratch;
    T* signals = sums + sums_size(l);
    const std::int64_t places = l.places[0] * l.places[1], plane = l.size[0] * l.size[1],
                       own = rows * l.size[1];
    // The rows of signals that the first and the last tap meet, and those in between.
    const std::int64_t first = meeting(l, 0, l.kernel[0] - 1, top, top + rows).first,
                       last = meeting(l, 0, 0, top, top + rows).last;
    if (first < last)
      transpose(l.signals + image / l.k * l.signals_example + image % l.k * l.signals_output +
                    first * l.places[1],
                places, l.outputs, (last - first) * l.places[1],
                signals + first * l.places[1] * step(l), step(l));
    for (std::int64_t i = 0; i < l.inputs; i += columns, weight += l.taps() * l.outputs * columns) {
      const std::int64_t count = l.inputs - i < columns ? l.inputs - i : columns;
      __builtin_memset(sums, 0, static_cast<std::size_t>(own * columns) * sizeof(T));
      (count > lanes ? add_taps<2> : add_taps<1>)(l, signals, weight, top, rows, sums);
      T* to = l.out + (image * l.inputs + i) * plane + top * l.size[1];
      transpose(sums, columns, own, count, to, plane);
      if (l.seen == nullptr) continue;
      const T* seen = l.seen + (image / l.k * l.inputs + i) * plane + top * l.size[1];
      for (std::int64_t c = 0; c < count; ++c, seen += plane, to += plane)
        for (std::int64_t e = 0; e < own; ++e) to[e] = seen[e] <= T(0) ? T(0) : to[e];
    }
  }

  static constexpr PlainSignalsKernels<T> table() {
    return {columns, &scratch_size, &turn_weight, &pull_back};
  }
};

constexpr PlainSignalsTable plain_signals_table{Plain<float>::table(), Plain<double>::table()};

}  // namespace

const PlainSignalsTable& table(const PlainSignalsTable*) { return plain_signals_table; }

}  // namespace jacpot::JACPOT_ISA
