// Transposition of square blocks in registers, for kernels' packing and mirrored output.
#pragma once

#include <utility>

#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {

// Interleaves the low or the high halves of two vectors.
template <class V, int Half, std::size_t... I>
JACPOT_INLINE typename V::Vec interleave(typename V::Vec a, typename V::Vec b,
                                         std::index_sequence<I...>) {
  constexpr int w = V::width;
  return __builtin_shufflevector(a, b,
                                 (static_cast<int>(I) / 2 + Half * w / 2 + (I % 2 ? w : 0))...);
}

// dst[j·dst_stride + i] = src[i][j], a perfect shuffle in log2(width) rounds.
template <class T>
JACPOT_INLINE void transpose_block(const T* const* src, T* dst, std::int64_t dst_stride) {
  using V = Simd<T>;
  constexpr int w = V::width;
  constexpr auto lanes = std::make_index_sequence<w>{};
  typename V::Vec v[w], u[w];
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) v[i] = V::load(src[i]);
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < w / 2; ++i) {
      u[2 * i] = interleave<V, 0>(v[i], v[i + w / 2], lanes);
      u[2 * i + 1] = interleave<V, 1>(v[i], v[i + w / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) v[i] = u[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) V::store(dst + i * dst_stride, v[i]);
}

// dst (cols, rows) = transpose of src (rows, cols), whose next rows are asked for meanwhile
template <class T>
JACPOT_INLINE void transpose(const T* src, std::int64_t src_stride, std::int64_t rows,
                             std::int64_t cols, T* dst, std::int64_t dst_stride) {
  constexpr int w = Simd<T>::width;
  for (std::int64_t i = 0; i < rows; i += w)
    for (std::int64_t j = 0; j < cols; j += w) {
      if (i + w <= rows && j + w <= cols) {
        const T* lines[w];
        for (int r = 0; r < w; ++r) {
          lines[r] = src + (i + r) * src_stride + j;
          __builtin_prefetch(lines[r] + w * src_stride);
        }
        transpose_block<T>(lines, dst + j * dst_stride + i, dst_stride);
      } else {
        for (std::int64_t r = i; r < rows && r < i + w; ++r)
          for (std::int64_t c = j; c < cols && c < j + w; ++c)
            dst[c * dst_stride + r] = src[r * src_stride + c];
      }
    }
}

}  // namespace jacpot::JACPOT_ISA
