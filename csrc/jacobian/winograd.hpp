// Rows of a convolution with a kernel of 3 x 3, stride 1 and dilation 1,
//
//   out[n, k, (g, o), (i, dy, dx)] = Σ_{y,x} δ[n, k, (g, o), y, x] · a[n, (g, i), y + dy, x + dx],
//
// by minimal filtering (Winograd 1980; Lavin & Gray 2016, F(3x3, 4x4)). A tile of 4 x 4 signals
// meets a window of 6 x 6 activations in 36 multiplications in place of 144: both are transformed,
//
//   out = Aᵀ [ Σ_tiles (G δ Gᵀ) ⊙ (Bᵀ a B) ] A,
//
// and the sum over tiles is a product of matrices for each of the 36. Rounding errors are about ten
// times those of the plain sum: 2e-6 of the largest entry in float32.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "common/status.hpp"

namespace jacpot {

template <class T>
struct ConvolutionLayer {
  std::int64_t n, k, groups, outputs, inputs;  // outputs and inputs of a group
  std::int64_t height, width;                  // places
  const T* activations;  // (N, G·I, height + 2, width + 2), padded, contiguous
  const T* signals;      // (N, K, G·O, height, width), contiguous but for examples and outputs
  std::int64_t signals_example, signals_output;

  std::int64_t tiles() const { return ((height + 3) / 4) * ((width + 3) / 4); }
};

template <class T>
Status convolution_rows(const ConvolutionLayer<T>& layer, T* out, int threads);

template <class T>
struct WinogradKernels {
  std::int64_t (*chunk)(const ConvolutionLayer<T>& layer);  // inputs that are done at a time
  // Elements that a worker needs for a chunk's transformed activations, and besides.
  std::int64_t (*activations_size)(const ConvolutionLayer<T>& layer);
  std::int64_t (*scratch_size)(const ConvolutionLayer<T>& layer);
  // to = the transformed windows of a (inputs, height + 2, width + 2)
  void (*transform)(const ConvolutionLayer<T>& layer, const T* a, std::int64_t inputs, T* to,
                    T* scratch);
  // out (O, I, 3, 3), of `inputs` of the I, from signals (O, height, width) and what they met
  void (*row)(const ConvolutionLayer<T>& layer, const T* signals, const T* transformed,
              std::int64_t inputs, T* out, T* scratch);
};

struct WinogradTable {
  WinogradKernels<float> f32;
  WinogradKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(WinogradTable)

}  // namespace jacpot
