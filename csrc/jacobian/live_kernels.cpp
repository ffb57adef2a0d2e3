#include "jacobian/live_kernels.hpp"

#include "common/shuffle.hpp"
#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

template <class T>
struct Live {
  using V = Simd<T>;
  using S = Shuffle<T>;
  using Vec = typename V::Vec;
  static constexpr int width = V::width;
  static constexpr int lane = S::lane;  // sums that are taken at once
  static constexpr std::int64_t block = live_block;
  static constexpr int most = LiveKernels<T>::most_vectors;

  static JACPOT_INLINE Vec load_part(const T* p, std::int64_t left) {
    if (left >= width) return V::load(p);
    return left > 0 ? V::load_first(p, left) : V::zero();
  }

  static void pack(std::int64_t vectors, const LiveRows<T>& from, T* panel) {
    const T* row = from.data;
    for (std::int64_t i = 0; i < from.rows; ++i, row += from.stride)
      for (std::int64_t c = 0; c < vectors; ++c, panel += width)
        V::store(panel, load_part(row + c * width, from.size - c * width));
  }

  static JACPOT_INLINE void fetch(const LiveRows<T>& ahead, std::int64_t row) {
    constexpr int line = 64 / static_cast<int>(sizeof(T));
    if (row >= ahead.rows) return;
    const T* from = ahead.data + row * ahead.stride;
    for (std::int64_t i = 0; i < ahead.size; i += line) __builtin_prefetch(from + i, 0, 2);
  }

  // z[r] += ⟨x, panel[entries[r]]⟩ for R entries, up to `lane`.
  template <int C, int R>
  static JACPOT_INLINE void dots_of(const T* panel, const std::uint8_t* entries, const Vec (&x)[C],
                                    T* z) {
    Vec acc[lane];
    const T* row[lane];
#pragma GCC unroll 4
    for (int r = 0; r < lane; ++r) {
      acc[r] = V::zero();
      row[r] = panel + entries[r < R ? r : 0] * std::int64_t{C * width};
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r] = V::fma(V::load(row[r] + c * width), x[c], acc[r]);
    if constexpr (R == lane) {
      S::add_sums(acc, z);
    } else {
      T total[lane] = {};
      S::add_sums(acc, total);
      for (int r = 0; r < R; ++r) z[r] += total[r];
    }
  }

  template <int C>
  static void dots(const T* panel, const std::int64_t* begins, const std::uint8_t* entries,
                   const LiveRows<T>& x, const std::int64_t* at, T* z, const LiveRows<T>& ahead,
                   const LiveRows<T>& later) {
    const bool whole = x.size == C * width;
    for (std::int64_t row = 0; row < x.rows; ++row) {
      fetch(ahead, row);
      fetch(later, row);
      const T* from = x.data + row * x.stride;
      Vec held[C];
      if (whole) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) held[c] = V::load(from + c * width);
      } else {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) held[c] = load_part(from + c * width, x.size - c * width);
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) S::keep(held[c]);
      const std::uint8_t* e = entries + begins[row];
      const std::uint8_t* end = entries + begins[row + 1];
      T* to = z + at[row];
      for (; e + lane <= end; e += lane, to += lane) dots_of<C, lane>(panel, e, held, to);
      if constexpr (lane > 2) {
        if (end - e == 3) dots_of<C, 3>(panel, e, held, to);
        if (end - e == 2) dots_of<C, 2>(panel, e, held, to);
      }
      if (end - e == 1) dots_of<C, 1>(panel, e, held, to);
    }
  }

  // sum[i] += Σ_e w[i][e] panel[e] of N units over the same rows e, each of which is loaded once.
  template <int C, int N>
  static JACPOT_INLINE void add_rows(std::uint64_t rows, const T* panel, const T* w,
                                     Vec (*sum)[C]) {
    for (; rows; rows &= rows - 1) {
      const int e = __builtin_ctzll(rows);
      const T* row = panel + e * (C * width);
      Vec b[N];
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) b[i] = V::broadcast(w[i * block + e]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        Vec x = V::load(row + c * width);
        if constexpr (N > 1) S::keep(x);
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) sum[i][c] = V::fma(b[i], x, sum[i][c]);
      }
    }
  }

  // Sums of N units. Two share the loads, of which there is one for each product otherwise, in the
  // rows in which both are live; where there are registers for it.
  template <int C, int N>
  static JACPOT_INLINE void sums_of(const T* panel, const std::uint64_t* rows, const T* w, T* out) {
    Vec sum[N][C];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] = V::load(out + (i * C + c) * width);
    const std::uint64_t all = N == 2 ? rows[0] & rows[N - 1] : 0;
    if constexpr (N == 2) add_rows<C, 2>(all, panel, w, sum);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) add_rows<C, 1>(rows[i] & ~all, panel, w + i * block, sum + i);
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) V::store(out + (i * C + c) * width, sum[i][c]);
  }

  template <int C>
  static void sums(const T* panel, const std::uint64_t* rows, std::int64_t units, const T* w,
                   T* out, const LiveRows<T>& ahead) {
    constexpr int at_once = JACPOT_VECTOR_BYTES == 64 ? 2 : 1;
    std::int64_t unit = 0;
    for (; unit + at_once <= units; unit += at_once) {
      for (int i = 0; i < at_once; ++i) fetch(ahead, unit + i);
      sums_of<C, at_once>(panel, rows + unit, w + unit * block, out + unit * C * width);
    }
    if (unit < units) sums_of<C, 1>(panel, rows + unit, w + unit * block, out + unit * C * width);
  }

  template <int C = most>
  static void dots_by(std::int64_t vectors, const T* panel, const std::int64_t* begins,
                      const std::uint8_t* entries, const LiveRows<T>& x, const std::int64_t* at,
                      T* z, const LiveRows<T>& ahead, const LiveRows<T>& later) {
    if (vectors == C)
      dots<C>(panel, begins, entries, x, at, z, ahead, later);
    else if constexpr (C > 1)
      dots_by<C - 1>(vectors, panel, begins, entries, x, at, z, ahead, later);
  }
  template <int C = most>
  static void sums_by(std::int64_t vectors, const T* panel, const std::uint64_t* rows,
                      std::int64_t units, const T* w, T* out, const LiveRows<T>& ahead) {
    if (vectors == C)
      sums<C>(panel, rows, units, w, out, ahead);
    else if constexpr (C > 1)
      sums_by<C - 1>(vectors, panel, rows, units, w, out, ahead);
  }

  static constexpr LiveKernels<T> kernels() { return {width, &pack, &dots_by<>, &sums_by<>}; }
};

constexpr LiveTable live_table{Live<float>::kernels(), Live<double>::kernels()};

}  // namespace

const LiveTable& table(const LiveTable*) { return live_table; }

}  // namespace jacpot::JACPOT_ISA
