// Products of small matrices on tensor cores, by one warp together: D = A·B + C in float32.
//
// Each lane holds a few values of every matrix, as the PTX ISA lays them out ("Matrix fragments for
// mma"). With g = lane / 4 and t = lane % 4:
//
//   C (16, 8)         rows g and g + 8, columns 2t and 2t + 1
//   A (16, 8), TF32   (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   B (8, 8), TF32    (t, g), (t + 4, g)
//   A (16, 16), 16 b  (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its neighbour
//   B (16, 8), 16 b   (2t, g), (2t + 8, g), each with the one below
#pragma once

#include "common/cuda_device.cuh"

namespace jacpot::cuda {

inline constexpr int mma_rows = 16, mma_columns = 8;

// Which element of C the i-th of a lane's four values is.
__device__ __forceinline__ int mma_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
__device__ __forceinline__ int mma_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// The nearest number of 11 significant bits, halves away from zero.
__device__ __forceinline__ float to_tf32(float x) {
#ifdef JACPOT_CUDA_EMULATOR
  return emulator::to_tf32(x);
#else
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#endif
}

// c += a·b for A (16, 8) and B (8, 8) in TF32.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef JACPOT_CUDA_EMULATOR
  emulator::mma<emulator::Tf32>(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

}  // namespace jacpot::cuda
