// Panels of packed rows, and the registers that a block of them is multiplied in.
//
// A panel holds `panel` rows, inner index by inner index: a kernel takes columns from it as
// vectors, and rows, a block of them at a time, as numbers that it broadcasts.
#pragma once

#include "common/register_tile.hpp"
#include "common/simd.hpp"
#include "jacobian/transpose.hpp"

namespace jacpot::JACPOT_ISA {

JACPOT_INLINE constexpr std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <class T>
struct Panels {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr int width = V::width;
  static constexpr int vectors = 3;  // of columns in a register tile
  static constexpr int panel = vectors * width;
  // Rows of a register tile: accumulators, one row of columns and a broadcast fill the registers.
  static constexpr int block = JACPOT_VECTOR_BYTES == 64 ? 8 : panel % 4 == 0 ? 4 : 3;

  // Rows and a panel of columns of two packed panels: Σ_x left[x, 0:block] ⊗ right[x, 0:panel]
  using Accumulator = RegisterTile<T, block, vectors>;

  // Inner indices whose columns, and the rows that pass by, stay in L1 together.
  static constexpr std::int64_t segment =
      (24 << 10) / (panel * static_cast<std::int64_t>(sizeof(T)));

  static JACPOT_INLINE void store(T* out, Accumulator& sums, T shift) {
    sums.each([=](Vec sum, int r, int j) {
      V::store(out + r * panel + j * width, sum + V::broadcast(shift));
    });
  }

  // Where a row (unit, output) belongs in a tile of the result, and its unit's products of
  // activations.
  struct Line {
    std::int64_t z, a;
  };

  // out[row] += a[unit of row] ⊙ sums[row], vector by vector, of the first `count` rows.
  template <int R, int C>
  static JACPOT_INLINE void multiply_into(T* out, const T* a, const Line* line, std::int64_t count,
                                          RegisterTile<T, R, C>& sums) {
    sums.each([=](Vec sum, int r, int j) __attribute__((always_inline)) {
      if (r >= count) return;
      T* to = out + line[r].z + j * width;
      V::store(to, V::fma(V::load(a + line[r].a + j * width), sum, V::load(to)));
    });
  }

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
    const T zeros[width] = {};
    for (int j = 0; j < panel; j += width) {
      std::int64_t x = 0;
      for (; x + width <= inner; x += width) {
        const T* at[width];
        for (int i = 0; i < width; ++i) at[i] = lines[j + i] ? lines[j + i] + x : zeros;
        transpose_block<T>(at, dst + x * dst_stride + j, dst_stride);
      }
      for (; x < inner; ++x)
        for (int i = 0; i < width; ++i)
          dst[x * dst_stride + j + i] = lines[j + i] ? lines[j + i][x] : T(0);
    }
  }

  // See GramKernels.
  static std::int64_t mark_active(const T* const* lines, std::int64_t count, std::int64_t inner,
                                  std::uint64_t* active, bool* finite) {
    std::int64_t total = 0;
    Vec difference = V::zero();
    for (std::int64_t x = 0; x < inner; x += width) {
      const std::int64_t n = min(width, inner - x);
      decltype(Vec{} < Vec{}) any{};
      for (std::int64_t k = 0; k < count; ++k) {
        const Vec v = V::load_first(lines[k] + x, n);
        any |= v != V::zero();
        difference += v - v;  // inf - inf is nan
      }
      std::uint64_t bits = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        bits |= std::uint64_t{any[i] != 0} << i;
        total += any[i] != 0;
      }
      active[x / 64] = (x % 64 ? active[x / 64] : 0) | bits << x % 64;
    }
    for (int i = 0; i < width; ++i) *finite = *finite && difference[i] == 0;
    return total;
  }
};

// The signals of one slice and pair of groups: all rows, and the columns of one panel of units.
template <class T>
struct PackedSignals {
  static constexpr int panel = Panels<T>::panel;
  const T *left, *right;
  std::int64_t inner;
  JACPOT_INLINE const T* row(std::int64_t row) const {
    return left + row / panel * inner * panel + row % panel;
  }
};

// One block of units (rows) against one panel of units (columns), of one layer.
template <class T>
struct GramPlace {
  std::int64_t unit;    // first of the rows, counted in their group
  std::int64_t count;   // rows that exist, at most `block`
  std::int64_t panels;  // of columns (unit, output) that hold any
  std::int64_t skip;    // of those, below the diagonal
  T* out;
  bool is_first;  // of the layers: nothing is in `out` yet
};

}  // namespace jacpot::JACPOT_ISA
