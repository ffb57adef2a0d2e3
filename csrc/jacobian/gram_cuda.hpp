// The fused Hadamard-Gram on a GPU; what is computed stands in gram.hpp.
//
// A block owns a tile of the output and goes through all layers, so that the output is written
// once. For each pair of positions it forms the activations' inner products of its examples once,
// in shared memory, and multiplies them into those of the signals, which stay in registers.
//
// Under a mask every output unit has activations of its own. Their products are a batch of plain
// ones, cuBLAS's; what is ours is to multiply them into those of the signals, unit by unit.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda.hpp"
#include "jacobian/gram.hpp"

namespace jacpot {

// How float32 is multiplied: exactly, or on tensor cores. There every number is rounded to TF32,
// which has 11 significant bits, or split into two of these, of whose products the three largest
// count. A product of four factors is then off by at most 2^-9, or 2^-19, of its size. float64 is
// always exact.
enum class CudaGramPrecision { exact, tf32x3, tf32 };

// out: full (N, K, M, K), trace (N, M), diagonal (N, M, K), contiguous. A symmetric product has
// M == N and right == left; it computes one half and is exactly symmetric. Layers keep all weights.
template <class T>
Status cuda_gram(const std::vector<GramLayer<T>>& layers, bool symmetric, std::int64_t n,
                 std::int64_t m, std::int64_t k, GramOutputs outputs, CudaGramPrecision precision,
                 T* out, cuda::Queue queue);

// Output units of a layer under a mask, at one pair of positions.
template <class T>
struct CudaGramUnits {
  struct Side {
    const T* signals = nullptr;  // (N, K, units) by these strides, units contiguous
    std::int64_t example = 0, output = 0;
  };
  std::int64_t count = 0;
  const T* products = nullptr;  // (units, N, M): of the activations that each unit keeps
  Side left, right;
};

// out (N, K, M, K) += Σ_u products[u, n, m] left[n, k, u] right[m, l, u] for K >= 2, contiguous; of
// a symmetric result, at least what is not below the diagonal.
template <class T>
Status cuda_add_units(const CudaGramUnits<T>& units, bool symmetric, std::int64_t n, std::int64_t m,
                      std::int64_t k, T* out, cuda::Queue queue);

}  // namespace jacpot
