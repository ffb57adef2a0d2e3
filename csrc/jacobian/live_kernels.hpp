// The bodies that are compiled per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace jacpot {

// Rows of activations, or units of V, that a panel holds: it fills most of a first cache of 32 KB,
// a place in it is a byte, and a set of them 64 bits.
inline constexpr std::int64_t live_block = 64;

// Rows of `size` elements: those that a panel is made of, or that meet it. Some are asked for from
// memory while others are worked on, one or two rows for each.
template <class T>
struct LiveRows {
  const T* data;
  std::int64_t stride, rows, size;
};

template <class T>
struct LiveKernels {
  static constexpr std::int64_t most_vectors = 8;  // of a panel's columns
  std::int64_t width;                              // of a vector

  // panel (rows, vectors · width) = rows, and zeros
  void (*pack)(std::int64_t vectors, const LiveRows<T>& from, T* panel);
  // z[at[row] + i] += ⟨x[row], panel[entries[begins[row] + i]]⟩
  void (*dots)(std::int64_t vectors, const T* panel, const std::int64_t* begins,
               const std::uint8_t* entries, const LiveRows<T>& x, const std::int64_t* at, T* z,
               const LiveRows<T>& ahead, const LiveRows<T>& later);
  // out[unit] += Σ_e w[unit, e] panel[e] over the unit's rows e, those whose bit is set;
  // w (units, block), out (units, vectors · width)
  void (*sums)(std::int64_t vectors, const T* panel, const std::uint64_t* rows, std::int64_t units,
               const T* w, T* out, const LiveRows<T>& ahead);
};

struct LiveTable {
  LiveKernels<float> f32;
  LiveKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(LiveTable)

}  // namespace jacpot
