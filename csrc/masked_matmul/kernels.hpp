// The bodies that are compiled per instruction set. A panel is `width` examples, feature by
// feature: (features, width), contiguous and aligned.
#pragma once

#include <cstdint>

#include "common/isa.hpp"
#include "masked_matmul/masked_matmul.hpp"

namespace jacpot::masked_matmul {

template <class T>
struct Kernels {
  std::int64_t width = 0;  // of a panel

  // Copies features [first, last) of examples [example, example + width) into a panel; zeros
  // beyond the last example.
  void (*pack)(const Activations<const T>& from, std::int64_t example, std::int64_t first,
               std::int64_t last, T* panel) = nullptr;
  // The way back; examples beyond the last are dropped.
  void (*unpack)(const T* panel, std::int64_t example, std::int64_t first, std::int64_t last,
                 const Activations<T>& to) = nullptr;
  // out[l] = Σ values[e] · panel[index[e]] over the entries e of each line in [first, last);
  // `out` begins at line `first`.
  void (*multiply)(const Lines& lines, const T* values, std::int64_t first, std::int64_t last,
                   const T* panel, T* out) = nullptr;
  // out[l] = max(out[l] + bias[l], 0) and its parts, in place.
  void (*finish)(std::int64_t first, std::int64_t last, const T* bias, bool relu, T* out) = nullptr;
  // d_values[e] += ⟨x[l], panel[index[e]]⟩ over the entries of lines [first, last); `x` begins
  // at line `first`.
  void (*sample)(const Lines& lines, std::int64_t first, std::int64_t last, const T* panel,
                 const T* x, T* d_values) = nullptr;
  // Both of the above in one walk: each loaded panel row feeds two FMAs.
  void (*fused)(const Lines& lines, const T* values, std::int64_t first, std::int64_t last,
                const T* panel, const T* x, T* out, T* d_values) = nullptr;
};

struct KernelTable {
  Kernels<float> of_float;
  Kernels<double> of_double;
};

}  // namespace jacpot::masked_matmul

namespace jacpot {
using MaskedMatmulKernels = masked_matmul::KernelTable;
JACPOT_DISPATCH_TABLE(MaskedMatmulKernels)
}  // namespace jacpot
