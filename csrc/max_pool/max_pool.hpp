// Max pooling, and its way back for several signals of each example.
//
// The tap of its window that was largest is kept as one byte for each place. Places of a row that
// fill a vector are done at a time, one tap after the other, in plain arithmetic. Behind
// a ReLU, a place whose largest is not above zero has no tap: signals end there, and what the ReLU
// gave need not be read again.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "common/status.hpp"

namespace jacpot {

struct MaxPool {
  static constexpr std::int64_t none = 255;  // no tap; a window must have fewer than that

  // along height and width: of what is pooled, of the places, and how windows lie
  std::int64_t size[2], places[2], kernel[2], stride[2], padding[2], dilation[2];

  std::int64_t plane() const { return size[0] * size[1]; }
  std::int64_t pooled() const { return places[0] * places[1]; }
};

// out, taps (planes, *places) of x (planes, *size).
template <class T>
Status max_pool(const MaxPool& layer, const T* x, std::int64_t planes, bool behind_relu, T* out,
                std::uint8_t* taps, int threads);

// out (N, K, C, *size) from signals (N, K, C, *places), contiguous but for N and K, and taps
// (N, C, *places).
template <class T>
struct PooledSignals {
  std::int64_t n, k, channels;
  const T* signals;
  std::int64_t signals_example, signals_output;
  const std::uint8_t* taps;
  T* out;
};
template <class T>
Status max_pool_backward(const MaxPool& layer, const PooledSignals<T>& given, int threads);

template <class T>
struct MaxPoolKernels {
  void (*pool)(const MaxPool& layer, const T* x, std::int64_t planes, bool behind_relu, T* out,
               std::uint8_t* taps);
  // of one plane
  void (*pull_back)(const MaxPool& layer, const T* signals, const std::uint8_t* taps, T* out);
};

struct MaxPoolTable {
  MaxPoolKernels<float> f32;
  MaxPoolKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(MaxPoolTable)

}  // namespace jacpot
