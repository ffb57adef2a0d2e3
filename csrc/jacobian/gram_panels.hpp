// Panels of packed rows, and the registers that a block of them is multiplied in.
//
// A panel holds `panel` rows, inner index by inner index: a kernel takes columns from it as
// vectors, and rows, a block of them at a time, as numbers that it broadcasts.
#pragma once

#include "common/simd.hpp"
#include "jacobian/transpose.hpp"

namespace jacpot::JACPOT_ISA {

template <class T>
struct Panels {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr int width = V::width;
  static constexpr int vectors = 3;  // of columns in a register tile
  static constexpr int panel = vectors * width;
  // Rows of a register tile: accumulators, one row of columns and a broadcast fill the registers.
  static constexpr int block = JACPOT_VECTOR_BYTES == 64 ? 8 : panel % 4 == 0 ? 4 : 3;

  // acc (block, panel) = Σ_x left[x, 0:block] ⊗ right[x, 0:panel]
  struct Accumulator {
    Vec v[block][vectors];
    JACPOT_INLINE Accumulator() {
#pragma GCC unroll 8
      for (int r = 0; r < block; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j) v[r][j] = V::zero();
    }
    JACPOT_INLINE void add(const T* left, const T* right) {
      Vec c[vectors];
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) c[j] = V::load(right + j * width);
#pragma GCC unroll 8
      for (int r = 0; r < block; ++r) {
        const Vec b = V::broadcast(left[r]);
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j) v[r][j] = V::fma(b, c[j], v[r][j]);
      }
    }
    JACPOT_INLINE void add(const T* left, const T* right, std::int64_t n) {
      for (std::int64_t x = 0; x < n; ++x, left += panel, right += panel) add(left, right);
    }
    JACPOT_INLINE void store(T* out, T shift) const {
#pragma GCC unroll 8
      for (int r = 0; r < block; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j)
          V::store(out + r * panel + j * width, v[r][j] + V::broadcast(shift));
    }
  };

  // The lanes of v that `index` names.
  static JACPOT_INLINE Vec permute(Vec v, const T* index) {
#if defined(__clang__)
    Vec out;
    for (int i = 0; i < width; ++i) out[i] = v[static_cast<int>(index[i])];
    return out;
#else
    return __builtin_shuffle(v, __builtin_convertvector(V::load(index), decltype(v < v)));
#endif
  }

  // A panel from its rows; null rows are zero.
  static void pack(const T* const* lines, std::int64_t inner, T* dst, std::int64_t dst_stride) {
    for (int j = 0; j < panel; j += width) {
      bool whole = true;
      for (int i = 0; i < width; ++i) whole = whole && lines[j + i];
      std::int64_t x = 0;
      for (; whole && x + width <= inner; x += width) {
        const T* at[width];
        for (int i = 0; i < width; ++i) at[i] = lines[j + i] + x;
        transpose_block<T>(at, dst + x * dst_stride + j, dst_stride);
      }
      for (; x < inner; ++x)
        for (int i = 0; i < width; ++i)
          dst[x * dst_stride + j + i] = lines[j + i] ? lines[j + i][x] : T(0);
    }
  }
};

}  // namespace jacpot::JACPOT_ISA
