// A tile of sums that stays in registers while it is added to: R rows by C vectors, the sum of
// outer products of R numbers, which are broadcast, and C vectors.
// Only for ISA_SOURCES.
#pragma once

#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {

template <class T, int R, int C>
struct RegisterTile {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static_assert(R <= 16 && C <= 4);

  Vec v[R][C];

  JACPOT_INLINE RegisterTile() {
    each([](Vec& sum, int, int) { sum = V::zero(); });
  }

  // f(sum, r, j) for all of the tile, unrolled.
  template <class F>
  JACPOT_INLINE void each(F f) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) f(v[r][j], r, j);
  }

  JACPOT_INLINE void add(const T* left, const Vec (&right)[C]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec b = V::broadcast(left[r]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) v[r][j] = V::fma(b, right[j], v[r][j]);
    }
  }
  JACPOT_INLINE void add(const T* left, const T* right) {
    Vec c[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) c[j] = V::load(right + j * V::width);
    add(left, c);
  }
  // Σ_x left[x] ⊗ right[x]
  JACPOT_INLINE void add(const T* left, std::int64_t left_step, const T* right,
                         std::int64_t right_step, std::int64_t n) {
    for (std::int64_t x = 0; x < n; ++x, left += left_step, right += right_step) add(left, right);
  }
  // Σ_x left[x] ⊗ right[rows[x]]
  JACPOT_INLINE void add(const T* left, std::int64_t left_step, const T* right,
                         std::int64_t right_step, const std::int32_t* rows, std::int64_t n) {
    for (std::int64_t x = 0; x < n; ++x, left += left_step) add(left, right + rows[x] * right_step);
  }
  // Σ_i left[x[i]] ⊗ right[x[i]]
  JACPOT_INLINE void add(const T* left, std::int64_t left_step, const T* right,
                         std::int64_t right_step, const std::uint32_t* x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const T* l = left + x[i] * left_step;
      asm("" : "+r"(l));  // one register, not one for each of its numbers
      add(l, right + x[i] * right_step);
    }
  }
};

// A count that is known when the program is compiled.
template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<count>{}) for a count of 1 to Max
template <int Max, class F>
JACPOT_INLINE void with_count(std::int64_t count, F f) {
  if (count == Max)
    f(Count<Max>{});
  else if constexpr (Max > 1)
    with_count<Max - 1>(count, f);
}

}  // namespace jacpot::JACPOT_ISA
