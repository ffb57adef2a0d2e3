// One vector type per instruction set, from the compiler's vector extensions: the same kernel
// source becomes SSE2, AVX2, AVX-512 or NEON code by the flags of its translation unit.
//
// Only for ISA_SOURCES. Everything here must inline: a weak symbol compiled with AVX-512 flags
// could be picked by the linker for the baseline code and crash on an older machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
  // To memory, past the caches: p is a multiple of the vector's size.
  static JACPOT_INLINE void stream(T* p, Vec v) {
#if JACPOT_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif JACPOT_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
    store(p, v);
#endif
  }
  // What was streamed is seen before what is stored from here on.
  static JACPOT_INLINE void end_stream() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }
  // The first n <= width elements, and zeros; memory beyond is not touched.
  static JACPOT_INLINE Vec load_first(const T* p, std::int64_t n) {
#if JACPOT_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
      return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), p);
    else
      return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1 << n) - 1), p);
#elif JACPOT_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
      return _mm256_maskload_ps(p, first(n));
    else
      return _mm256_maskload_pd(p, first(n));
#else
    T lanes[width] = {};
    for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
#endif
  }
  static JACPOT_INLINE void store_first(T* p, Vec v, std::int64_t n) {
#if JACPOT_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << n) - 1), v);
    else
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1 << n) - 1), v);
#elif JACPOT_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
      _mm256_maskstore_ps(p, first(n), v);
    else
      _mm256_maskstore_pd(p, first(n), v);
#else
    T lanes[width];
    store(lanes, v);
    for (std::int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
  }
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

#if JACPOT_VECTOR_BYTES == 32
 private:
  static JACPOT_INLINE __m256i first(std::int64_t n) {  // all bits of the first n lanes
    if constexpr (sizeof(T) == 4)
      return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    else
      return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
#endif
};

}  // namespace jacpot::JACPOT_ISA
