// Rearrangements of vectors: transposes and several sums at once.
// Only for ISA_SOURCES.
#pragma once

#include <type_traits>
#include <utility>

#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {

template <class T>
struct Shuffle {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  static constexpr int width = S::width;
  static constexpr int lane = 16 / static_cast<int>(sizeof(T));  // elements of a 128-bit lane
  typedef T Lane __attribute__((vector_size(16)));
  typedef T UnalignedLane __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  using Indices = std::make_integer_sequence<int, width>;

  // Stops the compiler from loading a value once for each of its uses.
  static JACPOT_INLINE void keep(Vec& v) {
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
  }

  // `lane` numbers, in every lane of a vector: one load, which compilers don't find by themselves.
  static JACPOT_INLINE Vec spread(const T* p) {
    const auto* from = reinterpret_cast<const UnalignedLane*>(p);
    Vec v;
#if defined(__AVX512F__)
    __asm__("vbroadcastf32x4 %1, %0" : "=v"(v) : "m"(*from));
#elif defined(__AVX__)
    __asm__("vbroadcastf128 %1, %0" : "=x"(v) : "m"(*from));
#else
    static_assert(width == lane);
    v = *from;
#endif
    return v;
  }
  // Number k of each lane, everywhere in it.
  template <int k, int... i>
  static JACPOT_INLINE Vec splat(Vec v, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(v, v, (i / lane * lane + k)...);
  }
  template <int k>
  static JACPOT_INLINE Vec splat(Vec v) {
    return splat<k>(v, Indices{});
  }

  // One step of Eklundh's transpose: swaps the off-diagonal blocks of size `block`.
  template <int block, int... i>
  static JACPOT_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, i...>) {
    const Vec upper = __builtin_shufflevector(a, b, ((i & block) ? width + i - block : i)...);
    b = __builtin_shufflevector(a, b, ((i & block) ? width + i : i + block)...);
    a = upper;
  }
  template <int block = width / 2>
  static JACPOT_INLINE void transpose(Vec (&rows)[width]) {
#pragma GCC unroll 16
    for (int r = 0; r < width; ++r)
      if (!(r & block)) exchange<block>(rows[r], rows[r + block], Indices{});
    if constexpr (block > 1) transpose<block / 2>(rows);
  }

  // [a0 b0 a1 b1] and [a2 b2 a3 b3] in each lane: the sum holds [a b a b].
  template <int... i>
  static JACPOT_INLINE Vec pair(Vec a, Vec b, std::integer_sequence<int, i...>) {
    const Vec low =
        __builtin_shufflevector(a, b, ((i & 1) * width + (i / lane) * lane + (i % lane) / 2)...);
    const Vec high = __builtin_shufflevector(
        a, b, ((i & 1) * width + (i / lane) * lane + (i % lane) / 2 + lane / 2)...);
    return low + high;
  }
  // From [a b a b] and [c d c d], [a b c d].
  template <int... i>
  static JACPOT_INLINE Vec quad(Vec ab, Vec cd, std::integer_sequence<int, i...>) {
    const Vec low =
        __builtin_shufflevector(ab, cd, ((i & 2) / 2 * width + (i / lane) * lane + (i & 1))...);
    const Vec high =
        __builtin_shufflevector(ab, cd, ((i & 2) / 2 * width + (i / lane) * lane + (i & 1) + 2)...);
    return low + high;
  }
  // The sum of the lanes, half by half.
  template <int size, class V>
  static JACPOT_INLINE auto halve(V v) {
    typedef T Half __attribute__((vector_size(size / 2 * sizeof(T))));
    const auto part = [&v]<int... i>(std::integer_sequence<int, i...>, auto offset)
                          __attribute__((always_inline)) -> Half {
      return __builtin_shufflevector(v, v, (i + decltype(offset)::value)...);
    };
    using Half_indices = std::make_integer_sequence<int, size / 2>;
    return part(Half_indices{}, std::integral_constant<int, 0>{}) +
           part(Half_indices{}, std::integral_constant<int, size / 2>{});
  }
  static JACPOT_INLINE Lane add_lanes(Vec v) {
    if constexpr (width == lane)
      return v;
    else if constexpr (width == 2 * lane)
      return halve<width>(v);
    else
      return halve<width / 2>(halve<width>(v));
  }

  // out[k] += the sum of v[k]: `lane` sums for about the price of one.
  static JACPOT_INLINE void add_sums(const Vec (&v)[lane], T* out) {
    Vec mixed = pair(v[0], v[1], Indices{});
    if constexpr (lane == 4) mixed = quad(mixed, pair(v[2], v[3], Indices{}), Indices{});
    auto* target = reinterpret_cast<UnalignedLane*>(out);
    *target += add_lanes(mixed);
  }
  static JACPOT_INLINE T sum(Vec v) {
    const Lane lanes = add_lanes(v);
    if constexpr (lane == 4)
      return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    else
      return lanes[0] + lanes[1];
  }
};

}  // namespace jacpot::JACPOT_ISA
