// Signals on their way back through a convolution with a kernel of 3 x 3, stride 1 and dilation 1,
//
//   out[n, k, i, y, x] = Σ_{o,dy,dx} δ[n, k, o, y + pad - dy, x + pad - dx] · w[o, i, dy, dx],
//
// by minimal filtering F(4x4, 3x3), a convolution with the kernel turned around:
//
//   out = Aᵀ [ Σ_o (G w Gᵀ) ⊙ (Bᵀ δ B) ] A
//
// for every tile of 4 x 4. The sum over outputs is a product of matrices for each of the 36 points.
// Rounding errors are about ten times those of the plain sum: of the largest entry in float32 6e-6
// with 32 channels, and 2e-5 with 512.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.hpp"
#include "common/status.hpp"

namespace jacpot {

template <class T>
struct ConvolutionSignals {
  std::int64_t n, k, outputs, inputs;
  std::int64_t signals_height, signals_width, height, width;  // width + 2 pad = signals_width + 2
  const T* weight;                                            // (O, I, 3, 3), contiguous
  const T* signals;  // (N, K, O, signals_height, signals_width), contiguous but for N and K
  std::int64_t signals_example, signals_output;
  const T* seen;  // (N, I, height, width), contiguous, what a ReLU gave the layer; or null
  T* out;         // (N, K, I, height, width), contiguous; zero where a ReLU was off

  std::int64_t tiles_down() const { return (height + 3) / 4; }
  std::int64_t tiles_across() const { return (width + 3) / 4; }
  std::int64_t tiles() const { return tiles_down() * tiles_across(); }
  // The tiles that are done at a time, so many that products are efficient, and few enough to stay
  // near: some whole images, or some rows of the tiles of one.
  std::int64_t images_at_once() const {
    return std::max<std::int64_t>(1, tiles_wanted() / tiles());
  }
  std::int64_t rows_at_once() const {
    return std::clamp<std::int64_t>(tiles_wanted() / tiles_across(), 1, tiles_down());
  }

 private:
  std::int64_t tiles_wanted() const {
    constexpr std::int64_t near = (192 << 10) / (36 * sizeof(T)), fewest = 16;
    return std::max(fewest, near / outputs);
  }
};

// out, from signals; n, k, outputs and inputs must not be 0.
template <class T>
Status convolution_signals(const ConvolutionSignals<T>& layer, int threads);

// Some rows of tiles of some images, n · K + k.
struct TileRange {
  std::int64_t first_image, images, first_row, rows;
};

template <class T>
struct WinogradSignalsKernels {
  std::int64_t (*weight_size)(const ConvolutionSignals<T>& layer);   // elements, transformed
  std::int64_t (*scratch_size)(const ConvolutionSignals<T>& layer);  // that a worker needs
  void (*transform_weight)(const ConvolutionSignals<T>& layer, std::int64_t output, T* to);
  void (*pull_back)(const ConvolutionSignals<T>& layer, const T* weight, TileRange tiles,
                    T* scratch);
};

struct WinogradSignalsTable {
  WinogradSignalsKernels<float> f32;
  WinogradSignalsKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(WinogradSignalsTable)

}  // namespace jacpot
