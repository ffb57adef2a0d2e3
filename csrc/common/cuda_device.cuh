// The device side of every CUDA kernel. Each primitive has a plain twin for the emulator.
#pragma once

#include <cstdint>

#include "common/cuda.hpp"

#ifndef JACPOT_CUDA_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace jacpot::cuda {

inline constexpr unsigned full_warp = 0xffffffffu;

// The block's dynamic shared memory, aligned for 16-byte accesses. All shared memory is dynamic:
// one mechanism, whose size the launch states and the emulator checks.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef JACPOT_CUDA_EMULATOR
  return reinterpret_cast<T*>(emulator::shared_bytes());
#else
  extern __shared__ __align__(128) unsigned char jacpot_shared_bytes[];
  return reinterpret_cast<T*>(jacpot_shared_bytes);
#endif
}

// Where in shared memory something lies, in bytes. What shared_memory() gives is aligned by 128, so
// that lower bits may be exchanged.
using SharedAddress = std::uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
#ifdef JACPOT_CUDA_EMULATOR
  return static_cast<SharedAddress>(static_cast<const unsigned char*>(shared) -
                                    emulator::shared_bytes());
#else
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
#endif
}

// The thread's number in its block, found anew by every call: what follows from it is then not kept
// in registers from one use to the next.
__device__ __forceinline__ int thread_anew() {
#ifdef JACPOT_CUDA_EMULATOR
  return static_cast<int>(threadIdx.x);
#else
  int out;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(out));
  return out;
#endif
}

// The upper 16 bits of two words, the first one's below.
__device__ __forceinline__ std::uint32_t upper_halves(std::uint32_t first, std::uint32_t second) {
#ifdef JACPOT_CUDA_EMULATOR
  return first >> 16 | (second & 0xffff0000u);
#else
  return __byte_perm(first, second, 0x7632);
#endif
}

// 16-bit floats as storage: arithmetic is in float32.
#ifdef JACPOT_CUDA_EMULATOR
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  _Float16 value;
};
inline float to_float(bfloat16 x) {
  const std::uint32_t wide = static_cast<std::uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}
inline float to_float(float16 x) { return static_cast<float>(x.value); }
inline void from_float(float x, float16* out) { out->value = static_cast<_Float16>(x); }
inline void from_float(float x, bfloat16* out) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x == x) bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  out->bits = static_cast<std::uint16_t>(bits >> 16);
}
#else
using bfloat16 = __nv_bfloat16;
using float16 = __half;
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, bfloat16* out) {
  *out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, float16* out) { *out = __float2half_rn(x); }
#endif

// What values of a type are summed in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return to_float(x); }
__device__ __forceinline__ float widen(float16 x) { return to_float(x); }

// Rounds a sum to the type it is stored in.
template <class T>
__device__ __forceinline__ T narrow(accumulator<T> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else {
    T out;
    from_float(x, &out);
    return out;
  }
}

// Sixteen bytes that travel in one access.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T value[size];
};

// Starts a copy of `bytes` (0..Size) from global to shared memory, zeros up to Size = 4, 8 or 16.
// Both addresses are multiples of Size. Done only after copies_wait and a barrier.
template <int Size = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  static_assert(Size == 4 || Size == 8 || Size == 16);
#ifdef JACPOT_CUDA_EMULATOR
  emulator::copy_later(shared, global, static_cast<std::size_t>(bytes), Size);
#else
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Size == 16)  // past the L1 cache, which is only possible for this size
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to), "l"(global),
                 "n"(Size), "r"(bytes)
                 : "memory");
#endif
}
__device__ __forceinline__ void copies_commit() {
#ifdef JACPOT_CUDA_EMULATOR
  emulator::close_group();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Waits until at most `Pending` committed groups of this thread are still under way.
template <int Pending>
__device__ __forceinline__ void copies_wait() {
#ifdef JACPOT_CUDA_EMULATOR
  emulator::wait_groups(Pending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

}  // namespace jacpot::cuda
