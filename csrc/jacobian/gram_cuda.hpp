// The fused Hadamard-Gram on a GPU; what is computed stands in gram.hpp.
//
// A block owns a tile of the output and goes through all layers, so that the output is written
// once. For each pair of positions (and, under a mask, for each output unit) it forms the
// activations' inner products of its examples once, in shared memory, and multiplies them into
// those of the signals, which stay in registers.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda.hpp"
#include "jacobian/gram.hpp"

namespace jacpot {

// Activations' inputs have strides of their own.
template <class T>
struct CudaGramLayer : GramLayer<T> {
  std::int64_t left_input = 1, right_input = 1;
};

// How float32 is multiplied: exactly, or on tensor cores. There every number is rounded to TF32,
// which has 11 significant bits, or split into two of these, of whose products the three largest
// count. A product of four factors is then off by at most 2^-9, or 2^-19, of its size. float64 is
// always exact.
enum class CudaGramPrecision { exact, tf32x3, tf32 };

// out: full (N, K, M, K), trace (N, M), diagonal (N, M, K), contiguous. A symmetric product has
// M == N and right == left; it computes one half and is exactly symmetric.
template <class T>
Status cuda_gram(const std::vector<CudaGramLayer<T>>& layers, bool symmetric, std::int64_t n,
                 std::int64_t m, std::int64_t k, GramOutputs outputs, CudaGramPrecision precision,
                 T* out, cuda::Queue queue);

}  // namespace jacpot
