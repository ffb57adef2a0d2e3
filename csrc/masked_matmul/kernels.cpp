#include "masked_matmul/kernels.hpp"

#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

using masked_matmul::Activations;
using masked_matmul::Kernels;
using masked_matmul::Lines;

constexpr int vectors = 8;  // accumulators of a line; with as many again they fit the registers

template <class T>
struct Body {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  static constexpr std::int64_t width = vectors * S::width;

  static void pack(const Activations<const T>& from, std::int64_t example, std::int64_t first,
                   std::int64_t last, T* panel) {
    const std::int64_t left = from.examples - example, count = left < width ? left : width;
    const T* start = from.data + example * from.example_stride;
    for (std::int64_t f = first; f < last; ++f) {
      T* row = panel + (f - first) * width;
      const T* source = start + f * from.feature_stride;
      for (std::int64_t n = 0; n < count; ++n) row[n] = source[n * from.example_stride];
      for (std::int64_t n = count; n < width; ++n) row[n] = 0;
    }
  }

  static void unpack(const T* panel, std::int64_t example, std::int64_t first, std::int64_t last,
                     const Activations<T>& to) {
    const std::int64_t left = to.examples - example, count = left < width ? left : width;
    T* start = to.data + example * to.example_stride;
    for (std::int64_t f = first; f < last; ++f) {
      const T* row = panel + (f - first) * width;
      T* target = start + f * to.feature_stride;
      for (std::int64_t n = 0; n < count; ++n) target[n * to.example_stride] = row[n];
    }
  }

  template <class Index>
  static void multiply_lines(const Lines& lines, const T* values, std::int64_t first,
                             std::int64_t last, const T* panel, T* out) {
    const auto* indices = static_cast<const Index*>(lines.indices);
    for (std::int64_t l = first; l < last; ++l, out += width) {
      Vec sum[vectors] = {};
      for (std::int64_t e = lines.offsets[l]; e < lines.offsets[l + 1]; ++e) {
        const T* row = panel + static_cast<std::int64_t>(indices[e]) * width;
        const Vec value = S::broadcast(values[e]);
        for (int v = 0; v < vectors; ++v)
          sum[v] = S::fma(value, S::load(row + v * S::width), sum[v]);
      }
      for (int v = 0; v < vectors; ++v) S::store(out + v * S::width, sum[v]);
    }
  }

  template <class Index>
  static void sample_lines(const Lines& lines, std::int64_t first, std::int64_t last,
                           const T* panel, const T* x, T* d_values) {
    const auto* indices = static_cast<const Index*>(lines.indices);
    for (std::int64_t l = first; l < last; ++l, x += width) {
      Vec held[vectors];
      for (int v = 0; v < vectors; ++v) held[v] = S::load(x + v * S::width);
      for (std::int64_t e = lines.offsets[l]; e < lines.offsets[l + 1]; ++e) {
        const T* row = panel + static_cast<std::int64_t>(indices[e]) * width;
        Vec even{}, odd{};
        for (int v = 0; v < vectors; v += 2) {
          even = S::fma(held[v], S::load(row + v * S::width), even);
          odd = S::fma(held[v + 1], S::load(row + (v + 1) * S::width), odd);
        }
        d_values[e] += S::sum(even + odd);
      }
    }
  }

  template <class Index>
  static void fused_lines(const Lines& lines, const T* values, std::int64_t first,
                          std::int64_t last, const T* panel, const T* x, T* out, T* d_values) {
    const auto* indices = static_cast<const Index*>(lines.indices);
    for (std::int64_t l = first; l < last; ++l, x += width, out += width) {
      Vec held[vectors], sum[vectors] = {};
      for (int v = 0; v < vectors; ++v) held[v] = S::load(x + v * S::width);
      for (std::int64_t e = lines.offsets[l]; e < lines.offsets[l + 1]; ++e) {
        const T* row = panel + static_cast<std::int64_t>(indices[e]) * width;
        const Vec value = S::broadcast(values[e]);
        Vec dot{};
        for (int v = 0; v < vectors; ++v) {
          const Vec loaded = S::load(row + v * S::width);
          sum[v] = S::fma(value, loaded, sum[v]);
          dot = S::fma(held[v], loaded, dot);
        }
        d_values[e] += S::sum(dot);
      }
      for (int v = 0; v < vectors; ++v) S::store(out + v * S::width, sum[v]);
    }
  }

  static void multiply(const Lines& lines, const T* values, std::int64_t first, std::int64_t last,
                       const T* panel, T* out) {
    if (lines.index_bytes == 2)
      multiply_lines<std::uint16_t>(lines, values, first, last, panel, out);
    else
      multiply_lines<std::int32_t>(lines, values, first, last, panel, out);
  }
  static void sample(const Lines& lines, std::int64_t first, std::int64_t last, const T* panel,
                     const T* x, T* d_values) {
    if (lines.index_bytes == 2)
      sample_lines<std::uint16_t>(lines, first, last, panel, x, d_values);
    else
      sample_lines<std::int32_t>(lines, first, last, panel, x, d_values);
  }
  static void fused(const Lines& lines, const T* values, std::int64_t first, std::int64_t last,
                    const T* panel, const T* x, T* out, T* d_values) {
    if (lines.index_bytes == 2)
      fused_lines<std::uint16_t>(lines, values, first, last, panel, x, out, d_values);
    else
      fused_lines<std::int32_t>(lines, values, first, last, panel, x, out, d_values);
  }

  static void finish(std::int64_t first, std::int64_t last, const T* bias, bool relu, T* out) {
    for (std::int64_t l = first; l < last; ++l, out += width) {
      const Vec add = bias ? S::broadcast(bias[l]) : S::zero();
      for (int v = 0; v < vectors; ++v) {
        Vec y = S::load(out + v * S::width) + add;
        if (relu) y = y < S::zero() ? S::zero() : y;  // a NaN stays one
        S::store(out + v * S::width, y);
      }
    }
  }

  static constexpr Kernels<T> kernels{width, pack, unpack, multiply, finish, sample, fused};
};

}  // namespace

const MaskedMatmulKernels& table(const MaskedMatmulKernels*) {
  static constexpr MaskedMatmulKernels kernels{Body<float>::kernels, Body<double>::kernels};
  return kernels;
}

}  // namespace jacpot::JACPOT_ISA
