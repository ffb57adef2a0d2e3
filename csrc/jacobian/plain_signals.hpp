// Signals on their way back through a convolution of any kernel, stride, padding and dilation,
//
//   out[n, k, i, y, x] = Σ_{o,dy,dx} δ[n, k, o, oy, ox] · w[o, i, dy, dx],
//   y = oy · stride - padding + dy · dilation, and x likewise,
//
// by plain sums: what each place of δ adds to the places that it saw, channels in the lanes of
// vectors, so that strides cost nothing and no multiplication meets a zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.hpp"
#include "common/status.hpp"

namespace jacpot {

template <class T>
struct PlainSignals {
  std::int64_t n, k, outputs, inputs;
  // along height and width; places are those of δ, and the size is that of `out`
  std::int64_t places[2], size[2], kernel[2], stride[2], padding[2], dilation[2];
  const T* weight;   // (O, I, *kernel), contiguous
  const T* signals;  // (N, K, O, *places), contiguous but for N and K
  std::int64_t signals_example, signals_output;
  const T* seen;  // (N, I, *size), contiguous, what a ReLU gave the layer; or null
  T* out;         // (N, K, I, *size), contiguous; zero where a ReLU was off

  std::int64_t taps() const { return kernel[0] * kernel[1]; }
  // Rows of `out` that are done at a time: so few that their sums, of `columns` channels, stay
  // near.
  std::int64_t rows_at_once(std::int64_t columns) const {
    constexpr std::int64_t near = (256 << 10) / sizeof(T);
    return std::clamp<std::int64_t>(near / (size[1] * columns), 1, size[0]);
  }
};

// out, from signals; nothing but `places` may be 0.
template <class T>
Status plain_signals(const PlainSignals<T>& layer, int threads);

template <class T>
struct PlainSignalsKernels {
  std::int64_t columns;                                        // inputs that are done at a time
  std::int64_t (*scratch_size)(const PlainSignals<T>& layer);  // that a worker needs
  // to [panel][tap][o][column] = the weight, `panel` being `columns` inputs
  void (*turn_weight)(const PlainSignals<T>& layer, std::int64_t panel, T* to);
  // some rows of an image of `out`, n · K + k
  void (*pull_back)(const PlainSignals<T>& layer, const T* weight, std::int64_t image,
                    std::int64_t first_row, std::int64_t rows, T* scratch);
};

struct PlainSignalsTable {
  PlainSignalsKernels<float> f32;
  PlainSignalsKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(PlainSignalsTable)

}  // namespace jacpot
