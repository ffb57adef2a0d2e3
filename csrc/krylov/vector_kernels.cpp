#include "krylov/vector_kernels.hpp"

#include "common/simd.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

using V = Simd<double>;
using Vec = V::Vec;

struct Whole {
  static JACPOT_INLINE Vec load(const double* p) { return V::load(p); }
  static JACPOT_INLINE void store(double* p, Vec v) { V::store(p, v); }
};
struct Part {
  std::int64_t n;
  JACPOT_INLINE Vec load(const double* p) const { return V::load_first(p, n); }
  JACPOT_INLINE void store(double* p, Vec v) const { V::store_first(p, v, n); }
};

// As many rows as a vector has lanes are `count` vectors, and the lanes of vector k hold the same
// columns in every such tile: these are their coefficients.
JACPOT_INLINE Vec lanes_of(const double* coefficients, std::int64_t count, std::int64_t k) {
  double lanes[V::width];
  for (int l = 0; l < V::width; ++l) lanes[l] = coefficients[(k * V::width + l) % count];
  return V::load(lanes);
}

// Calls start(k), and what that returns with every vector k of a block: body(access, offset, sum).
// Then sums (terms, count) += the lanes of sum (terms).
template <int terms, class Start>
JACPOT_INLINE void sweep(std::int64_t rows, std::int64_t count, double* sums, Start start) {
  const std::int64_t tile = count * V::width, tiles = rows / V::width;
  for (std::int64_t k = 0; k < count; ++k) {
    const auto body = start(k);
    Vec sum[terms];
    for (auto& s : sum) s = V::zero();
    std::int64_t i = k * V::width;
    for (std::int64_t t = 0; t < tiles; ++t, i += tile) body(Whole{}, i, sum);
    const std::int64_t left = rows * count - i;
    if (left >= V::width)
      body(Whole{}, i, sum);
    else if (left > 0)
      body(Part{left}, i, sum);
    for (int s = 0; s < terms; ++s) {
      double lanes[V::width];
      V::store(lanes, sum[s]);
      for (int l = 0; l < V::width; ++l) sums[s * count + (k * V::width + l) % count] += lanes[l];
    }
  }
}

void dot(std::int64_t rows, std::int64_t count, const double* x, const double* y, double* sums) {
  sweep<1>(rows, count, sums, [=](std::int64_t) {
    return [=](auto at, std::int64_t i, Vec* sum) __attribute__((always_inline)) {
      sum[0] = V::fma(at.load(x + i), at.load(y + i), sum[0]);
    };
  });
}

void combine(std::int64_t rows, std::int64_t count, const double* alpha, const double* x,
             const double* scale, double* y) {
  sweep<0>(rows, count, nullptr, [=](std::int64_t k) {
    const Vec a = lanes_of(alpha, count, k), s = lanes_of(scale, count, k);
    return [=](auto at, std::int64_t i, Vec*) __attribute__((always_inline)) {
      at.store(y + i, V::fma(a, at.load(x + i), s * at.load(y + i)));
    };
  });
}

void curvature(std::int64_t rows, std::int64_t count, double damping, const double* p,
               const double* r, double* q, double* sums) {
  const Vec shift = V::broadcast(damping);
  sweep<4>(rows, count, sums, [=](std::int64_t) {
    return [=](auto at, std::int64_t i, Vec* sum) __attribute__((always_inline)) {
      const Vec pi = at.load(p + i), qi = V::fma(shift, pi, at.load(q + i));
      at.store(q + i, qi);
      sum[0] = V::fma(pi, qi, sum[0]);
      sum[1] = V::fma(pi, pi, sum[1]);
      sum[2] = V::fma(qi, qi, sum[2]);
      sum[3] = V::fma(pi, at.load(r + i), sum[3]);
    };
  });
}

void advance(std::int64_t rows, std::int64_t count, const double* alpha, const double* p,
             const double* q, double* x, double* r, double* sums) {
  sweep<1>(rows, count, sums, [=](std::int64_t k) {
    const Vec a = lanes_of(alpha, count, k);
    return [=](auto at, std::int64_t i, Vec* sum) __attribute__((always_inline)) {
      at.store(x + i, V::fma(a, at.load(p + i), at.load(x + i)));
      const Vec ri = at.load(r + i) - a * at.load(q + i);
      at.store(r + i, ri);
      sum[0] = V::fma(ri, ri, sum[0]);
    };
  });
}

template <class S>
void load(std::int64_t size, double factor, const double* from, S* to) {
  for (std::int64_t i = 0; i < size; ++i) to[i] = static_cast<S>(factor * from[i]);
}

template <class S>
void add_up(std::int64_t size, std::int64_t count, const S* from, std::int64_t stride, double* to) {
  typedef S Narrow
      __attribute__((vector_size(V::width * sizeof(S)), aligned(sizeof(S)), may_alias));
  std::int64_t i = 0;
  for (; i + V::width <= size; i += V::width) {
    Vec sum = V::zero();
    for (std::int64_t k = 0; k < count; ++k)
      sum += __builtin_convertvector(*reinterpret_cast<const Narrow*>(from + k * stride + i), Vec);
    V::store(to + i, sum);
  }
  for (; i < size; ++i) {
    to[i] = 0;
    for (std::int64_t k = 0; k < count; ++k) to[i] += from[k * stride + i];
  }
}

constexpr VectorTable kernels{&dot,
                              &combine,
                              &curvature,
                              &advance,
                              {&load<float>, &add_up<float>},
                              {&load<double>, &add_up<double>}};

}  // namespace

const VectorTable& table(const VectorTable*) { return kernels; }

}  // namespace jacpot::JACPOT_ISA
