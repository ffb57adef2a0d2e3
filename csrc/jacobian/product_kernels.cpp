#include "common/register_tile.hpp"
#include "common/simd.hpp"
#include "jacobian/products.hpp"
#include "jacobian/transpose.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jacpot::JACPOT_ISA {
namespace {

// Stores past the cache: rows are written once and are larger than it.
JACPOT_INLINE void stream(float* to, Simd<float>::Vec v) {
#if JACPOT_VECTOR_BYTES == 64
  _mm512_stream_ps(to, v);
#elif JACPOT_VECTOR_BYTES == 32
  _mm256_stream_ps(to, v);
#elif defined(__SSE2__)
  _mm_stream_ps(to, v);
#else
  Simd<float>::store(to, v);
#endif
}
JACPOT_INLINE void stream(double* to, Simd<double>::Vec v) {
#if JACPOT_VECTOR_BYTES == 64
  _mm512_stream_pd(to, v);
#elif JACPOT_VECTOR_BYTES == 32
  _mm256_stream_pd(to, v);
#elif defined(__SSE2__)
  _mm_stream_pd(to, v);
#else
  Simd<double>::store(to, v);
#endif
}

template <class T>
struct Products {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr int width = V::width;
  static constexpr int forward = 4;   // vectors of examples in a sparse product,
  static constexpr int backward = 8;  // in a sampled one,
  static constexpr int outputs_at_once = width < 16 ? width : 16;  // and rows of signals in a dot

  template <bool Squared>
  static JACPOT_INLINE Vec square_if(Vec a) {
    return Squared ? a * a : a;
  }

  // Σ of the lanes of `width` vectors: lane i of the result is the sum of v[i].
  static JACPOT_INLINE Vec sums(Vec (&v)[width]) {
    constexpr auto lanes = std::make_index_sequence<width>{};
#pragma GCC unroll 4
    for (int half = width / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i)
        v[i] =
            interleave<V, 0>(v[i], v[i + half], lanes) + interleave<V, 1>(v[i], v[i + half], lanes);
    return v[0];
  }

  // out[k] += ⟨s[k], z⟩ for K rows of signals at once. The rows after these are asked for
  // meanwhile: that many streams are more than the hardware follows.
  template <int K, bool Squared>
  static void dot_rows(const T* s, std::int64_t step, std::int64_t length, const T* z, T* out,
                       std::int64_t out_step) {
    Vec acc[width];
#pragma GCC unroll 16
    for (int k = 0; k < width; ++k) acc[k] = V::zero();
    std::int64_t x = 0;
    for (; x + width <= length; x += width) {
      const Vec c = V::load(z + x);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        __builtin_prefetch(s + (K + k) * step + x);
        acc[k] = V::fma(square_if<Squared>(V::load(s + k * step + x)), c, acc[k]);
      }
    }
    if (const std::int64_t rest = length - x; rest > 0) {
      const Vec c = V::load_first(z + x, rest);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k)
        acc[k] = V::fma(square_if<Squared>(V::load_first(s + k * step + x, rest)), c, acc[k]);
    }
    T total[width];
    V::store(total, sums(acc));
    for (int k = 0; k < K; ++k) out[k * out_step] += total[k];
  }

  template <int K, bool Squared>
  static void dot_rows_of(std::int64_t count, const T* s, std::int64_t step, std::int64_t length,
                          const T* z, T* out, std::int64_t out_step) {
    if (count == K)
      dot_rows<K, Squared>(s, step, length, z, out, out_step);
    else if constexpr (K > 1)
      dot_rows_of<K - 1, Squared>(count, s, step, length, z, out, out_step);
  }

  template <bool Squared>
  static void dot_of(const T* s, std::int64_t k, std::int64_t step, std::int64_t length, const T* z,
                     std::int64_t r, std::int64_t z_stride, T* out) {
    const std::int64_t parts = (k + outputs_at_once - 1) / outputs_at_once;
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t q = part * k / parts, count = (part + 1) * k / parts - q;
      for (std::int64_t j = 0; j < r; ++j)
        dot_rows_of<outputs_at_once, Squared>(count, s + q * step, step, length, z + j * z_stride,
                                              out + q * r + j, r);
    }
  }
  static void dot(const T* s, std::int64_t k, std::int64_t step, std::int64_t length, const T* z,
                  std::int64_t r, std::int64_t z_stride, bool squared, T* out) {
    (squared ? dot_of<true> : dot_of<false>)(s, k, step, length, z, r, z_stride, out);
  }

  template <bool Squared>
  static void combine_of(const T* s, std::int64_t k, std::int64_t step, std::int64_t length,
                         const T* u, std::int64_t r, std::int64_t w_stride, T* w) {
    constexpr int at_once = 4;  // chains that hide the latency of the additions
    for (std::int64_t j = 0; j < r; ++j) {
      T* to = w + j * w_stride;
      std::int64_t x = 0;
      for (; x + at_once * width <= length; x += at_once * width) {
        Vec acc[at_once];
        for (int i = 0; i < at_once; ++i) acc[i] = V::zero();
        for (std::int64_t q = 0; q < k; ++q) {
          const Vec b = V::broadcast(u[q * r + j]);
#pragma GCC unroll 4
          for (int i = 0; i < at_once; ++i) {
            __builtin_prefetch(s + (k + q) * step + x + i * width);
            acc[i] = V::fma(b, square_if<Squared>(V::load(s + q * step + x + i * width)), acc[i]);
          }
        }
        for (int i = 0; i < at_once; ++i) V::store(to + x + i * width, acc[i]);
      }
      for (; x < length; x += width) {
        const std::int64_t rest = length - x;
        Vec acc = V::zero();
        for (std::int64_t q = 0; q < k; ++q) {
          const T* from = s + q * step + x;
          const Vec a = rest >= width ? V::load(from) : V::load_first(from, rest);
          acc = V::fma(V::broadcast(u[q * r + j]), square_if<Squared>(a), acc);
        }
        if (rest >= width)
          V::store(to + x, acc);
        else
          V::store_first(to + x, acc, rest);
      }
    }
  }
  static void combine(const T* s, std::int64_t k, std::int64_t step, std::int64_t length,
                      const T* u, std::int64_t r, std::int64_t w_stride, bool squared, T* w) {
    (squared ? combine_of<true> : combine_of<false>)(s, k, step, length, u, r, w_stride, w);
  }

  static void pack(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                   std::int64_t block, T* dst) {
    if (rows < block)
      for (std::int64_t c = 0; c < columns; ++c)
        for (std::int64_t i = rows; i < block; ++i) dst[c * block + i] = 0;
    transpose(x, stride, rows, columns, dst, block);
  }

  static void multiply(const T* x, const std::int64_t* offsets, const std::int32_t* columns,
                       const T* v, std::int64_t outputs, std::int64_t rows, T* z,
                       std::int64_t z_stride, T* scratch, const T* ahead, std::int64_t ahead_size) {
    constexpr int block = forward * width;
    const std::int64_t pairs = (offsets[outputs] - offsets[0]) / 2;
    const std::int64_t step = pairs ? ahead_size / pairs : 0;
    for (std::int64_t o = 0; o < outputs; ++o) {
      // Two chains per vector hide the latency of the additions.
      Vec even[forward], odd[forward];
      for (int j = 0; j < forward; ++j) even[j] = odd[j] = V::zero();
      std::int64_t e = offsets[o];
      for (; e + 1 < offsets[o + 1]; e += 2) {
        const T* a = x + columns[e] * static_cast<std::int64_t>(block);
        const T* b = x + columns[e + 1] * static_cast<std::int64_t>(block);
        const Vec p = V::broadcast(v[e]), q = V::broadcast(v[e + 1]);
        __builtin_prefetch(ahead, 0, 2);
        ahead += step;
#pragma GCC unroll 4
        for (int j = 0; j < forward; ++j) {
          even[j] = V::fma(p, V::load(a + j * width), even[j]);
          odd[j] = V::fma(q, V::load(b + j * width), odd[j]);
        }
      }
      if (e < offsets[o + 1]) {
        const T* a = x + columns[e] * static_cast<std::int64_t>(block);
        for (int j = 0; j < forward; ++j)
          even[j] = V::fma(V::broadcast(v[e]), V::load(a + j * width), even[j]);
      }
      for (int j = 0; j < forward; ++j) V::store(scratch + o * block + j * width, even[j] + odd[j]);
    }
    transpose(scratch, block, outputs, rows, z, z_stride);
  }

  static void sample(const T* w, const T* x, const std::int64_t* offsets,
                     const std::int32_t* columns, std::int64_t outputs, T* g) {
    constexpr int block = backward * width;
    for (std::int64_t o = 0; o < outputs; ++o) {
      Vec own[backward];
#pragma GCC unroll 8
      for (int j = 0; j < backward; ++j) own[j] = V::load(w + o * block + j * width);
      for (std::int64_t e = offsets[o]; e < offsets[o + 1]; e += width) {
        const std::int64_t count = offsets[o + 1] - e < width ? offsets[o + 1] - e : width;
        Vec acc[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          const T* a = x + columns[e + (i < count ? i : 0)] * static_cast<std::int64_t>(block);
          Vec sum = own[0] * V::load(a);
#pragma GCC unroll 8
          for (int j = 1; j < backward; ++j) sum = V::fma(own[j], V::load(a + j * width), sum);
          acc[i] = sum;
        }
        const Vec total = sums(acc);
        if (count == width) {
          V::store(g + e, V::load(g + e) + total);
        } else {
          T lanes[width];
          V::store(lanes, total);
          for (std::int64_t i = 0; i < count; ++i) g[e + i] += lanes[i];
        }
      }
    }
  }

  static void outer(const T* signal, std::int64_t outputs, const T* activation, std::int64_t inputs,
                    T* out) {
    for (std::int64_t o = 0; o < outputs; ++o, out += inputs) {
      const Vec b = V::broadcast(signal[o]);
      const auto misaligned =
          reinterpret_cast<std::uintptr_t>(out) % JACPOT_VECTOR_BYTES / sizeof(T);
      std::int64_t i = 0, head = misaligned ? width - static_cast<std::int64_t>(misaligned) : 0;
      for (; i < head && i < inputs; ++i) out[i] = signal[o] * activation[i];
      for (; i + width <= inputs; i += width) stream(out + i, b * V::load(activation + i));
      for (; i < inputs; ++i) out[i] = signal[o] * activation[i];
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }

  // R signals and as many vectors of activations, over all positions.
  template <int R, int Vectors>
  static void sum_tile(const T* signal, std::int64_t signal_step, const T* activation,
                       std::int64_t activation_step, std::int64_t positions, T* out,
                       std::int64_t out_step, std::int64_t columns) {
    RegisterTile<T, R, Vectors> tile;
    tile.add(signal, signal_step, activation, activation_step, positions);
    tile.each([=](Vec sum, int r, int j) {
      T* to = out + r * out_step + j * width;
      if (const std::int64_t left = columns - j * width; left >= width)
        V::store(to, sum);
      else
        V::store_first(to, sum, left);
    });
  }

  template <int R, int Vectors>
  static void sum_rows(const T* signal, std::int64_t signal_step, std::int64_t outputs,
                       const T* activation, std::int64_t activation_step, std::int64_t positions,
                       T* out, std::int64_t out_step, std::int64_t columns) {
    std::int64_t o = 0;
    for (; o + R <= outputs; o += R)
      sum_tile<R, Vectors>(signal + o, signal_step, activation, activation_step, positions,
                           out + o * out_step, out_step, columns);
    if constexpr (R > 1)
      if (o < outputs)
        sum_rows<R / 2, Vectors>(signal + o, signal_step, outputs - o, activation, activation_step,
                                 positions, out + o * out_step, out_step, columns);
  }

  static void sum_outer(const T* signal, std::int64_t signal_step, std::int64_t outputs,
                        const T* activation, std::int64_t activation_step, std::int64_t inputs,
                        std::int64_t positions, T* out, std::int64_t out_step) {
    constexpr int rows = JACPOT_VECTOR_BYTES == 64 ? 8 : 4;
    for (std::int64_t i = 0; i < inputs; i += 3 * width) {
      const std::int64_t left = inputs - i;
      const auto tile = left <= width       ? &sum_rows<rows, 1>
                        : left <= 2 * width ? &sum_rows<rows, 2>
                                            : &sum_rows<rows, 3>;
      tile(signal, signal_step, outputs, activation + i, activation_step, positions, out + i,
           out_step, left);
    }
  }

  static void gather(const T* from, const std::int64_t* runs, std::int64_t count, std::int64_t run,
                     T* to) {
    V::store(to + (count * run - 1) / width * width, V::zero());
    for (std::int64_t r = 0; r < count; ++r, to += run) {
      const T* first = from + runs[r];
      std::int64_t x = 0;
      for (; x + width <= run; x += width) V::store(to + x, V::load(first + x));
      if (x < run) V::store(to + x, V::load_first(first + x, run - x));
    }
  }

  static constexpr ProductKernels<T> kernels() {
    return {forward * width, backward * width, &dot,       &combine, &pack, &multiply, &sample,
            width,           &gather,          &sum_outer, &outer};
  }
};

constexpr ProductTable product_table{Products<float>::kernels(), Products<double>::kernels()};

}  // namespace

const ProductTable& table(const ProductTable*) { return product_table; }

}  // namespace jacpot::JACPOT_ISA
