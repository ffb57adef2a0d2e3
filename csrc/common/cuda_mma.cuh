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

#include <type_traits>

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

#ifdef JACPOT_CUDA_EMULATOR
// The same of pairs of 16-bit numbers, for the emulator.
template <class T>
struct Pairs {
  using Register = std::uint32_t;
  static constexpr int depth = 16;
  static int lane(int outer, int k) { return outer % 8 * 4 + k % 8 / 2; }
  static int a_register(int row, int k) { return row / 8 + k / 8 * 2; }
  static int b_register(int k) { return k / 8; }
  static double value(Register pair, int k) {
    const auto bits = static_cast<std::uint16_t>(pair >> k % 2 * 16);
    return to_float(std::bit_cast<T>(bits));
  }
};
#endif

// c += a·b for A (16, 16) and B (16, 8) of bfloat16 or float16.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4],
                                    const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
#ifdef JACPOT_CUDA_EMULATOR
  emulator::mma<Pairs<T>>(c, a, b);
#else
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Loads four matrices (8, 8) of 16-bit numbers from shared memory, transposed. Lane 8i + r gives
// the address of row r of the i-th, 16 bytes at a multiple of 16. Of each, a lane gets the elements
// (2t, g) and (2t + 1, g): B's fragments, where the rows are what is summed over.
__device__ __forceinline__ void load_transposed(std::uint32_t (&out)[4], SharedAddress row) {
#ifdef JACPOT_CUDA_EMULATOR
  emulator::load_transposed(out, emulator::shared_bytes() + row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
#endif
}

}  // namespace jacpot::cuda
