// What minimal filtering with a kernel of 3 x 3 and tiles of 4 x 4 is made of (Winograd 1980; Lavin
// & Gray 2016): planes with channels in the lanes of a vector, so that every transform is plain
// arithmetic on vectors, and the transforms of points 0, 1, -1, 2, -2 and infinity along a line.
#pragma once

#include "jacobian/transpose.hpp"

namespace jacpot::JACPOT_ISA {

template <class T>
struct WinogradTiles {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr int lanes = V::width;
  static constexpr int points = 36, kernel = 9;
  static constexpr int side = 4, window = 6;
  static constexpr std::int64_t pad = 64 / sizeof(T);  // points must not share a cache set

  static std::int64_t blocks(std::int64_t channels) { return (channels + lanes - 1) / lanes; }

  // to [place][lane] = planes (channels, size), `apart`, zero in lanes beyond the channels
  static void turn(const T* planes, std::int64_t apart, std::int64_t channels, std::int64_t size,
                   T* to) {
    if (channels < lanes)
      for (std::int64_t i = 0; i < size * lanes; ++i) to[i] = T(0);
    transpose(planes, apart, channels < lanes ? channels : lanes, size, to, lanes);
  }

  // Bᵀ x
  static JACPOT_INLINE void transform_window(const Vec (&x)[window], Vec (&to)[window]) {
    const Vec a = x[4] - T(4) * x[2], b = x[3] - T(4) * x[1], c = x[4] - x[2],
              d = T(2) * (x[3] - x[1]);
    to[0] = T(4) * x[0] - T(5) * x[2] + x[4];
    to[1] = a + b;
    to[2] = a - b;
    to[3] = c + d;
    to[4] = c - d;
    to[5] = T(4) * x[1] - T(5) * x[3] + x[5];
  }

  // Puts (Line ⊗ Line) x of the Size x Size places x from (y, x) on to `points` places of `to` that
  // lie `step` apart. Around the planes (height, width, lane) lie zeros.
  template <int Size, void (*Line)(const Vec (&)[Size], Vec (&)[window])>
  static JACPOT_INLINE void transform_tile(const T* turned, std::int64_t height, std::int64_t width,
                                           std::int64_t y, std::int64_t x, T* to,
                                           std::int64_t step) {
    Vec tile[Size][Size];
    if (y >= 0 && x >= 0 && y + Size <= height && x + Size <= width) {
#pragma GCC unroll 6
      for (int i = 0; i < Size; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < Size; ++j)
          tile[j][i] = V::load(turned + ((y + i) * width + x + j) * lanes);
    } else {
      for (int i = 0; i < Size; ++i)
        for (int j = 0; j < Size; ++j)
          tile[j][i] = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width
                           ? V::load(turned + ((y + i) * width + x + j) * lanes)
                           : V::zero();
    }
    Vec half[window][Size];
#pragma GCC unroll 6
    for (int j = 0; j < Size; ++j) {
      Vec line[window];
      Line(tile[j], line);
#pragma GCC unroll 6
      for (int i = 0; i < window; ++i) half[i][j] = line[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < window; ++i) {
      Vec line[window];
      Line(half[i], line);
#pragma GCC unroll 6
      for (int j = 0; j < window; ++j) V::store(to + (i * window + j) * step, line[j]);
    }
  }
};

}  // namespace jacpot::JACPOT_ISA
