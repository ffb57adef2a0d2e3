// One vector type per instruction set, from the compiler's vector extensions: the same kernel
// source becomes SSE2, AVX2, AVX-512 or NEON code by the flags of its translation unit.
//
// Only for ISA_SOURCES. Everything here must inline: a weak symbol compiled with AVX-512 flags
// could be picked by the linker for the baseline code and crash on an older machine.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef JACPOT_VECTOR_BYTES
#error "simd.hpp belongs in a translation unit that is compiled per instruction set"
#endif

#define JACPOT_INLINE inline __attribute__((always_inline))

namespace jacpot::JACPOT_ISA {

template <class T>
struct Simd {
  static constexpr int width = JACPOT_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T Vec __attribute__((vector_size(JACPOT_VECTOR_BYTES)));
  typedef T Unaligned
      __attribute__((vector_size(JACPOT_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  static JACPOT_INLINE Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static JACPOT_INLINE void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static JACPOT_INLINE Vec zero() { return Vec{}; }
  static JACPOT_INLINE Vec broadcast(T x) { return x - Vec{}; }  // x - 0 keeps the sign of -0
  // Contracted to one FMA where the instruction set has it.
  static JACPOT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static JACPOT_INLINE T sum(Vec v) {
    T lanes[width];
    store(lanes, v);
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

}  // namespace jacpot::JACPOT_ISA
