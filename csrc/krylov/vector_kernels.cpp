#include "krylov/vector_kernels.hpp"

#include "common/shuffle.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

using V = Simd<double>;

JACPOT_INLINE V::Vec load(const double* p) { return V::load(p); }
JACPOT_INLINE V::Vec load(const float* p) {
  typedef float Narrow __attribute__((vector_size(JACPOT_VECTOR_BYTES / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), V::Vec);
}

template <class T>
double dot(std::int64_t size, const T* x, const double* y) {
  constexpr int chains = 4;  // they hide the latency of the additions
  V::Vec sum[chains];
  for (auto& s : sum) s = V::zero();
  std::int64_t i = 0;
  for (; i + chains * V::width <= size; i += chains * V::width)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      const auto at = i + c * V::width;
      sum[c] = V::fma(load(x + at), V::load(y + at), sum[c]);
    }
  double total = Shuffle<double>::sum(sum[0] + sum[1] + (sum[2] + sum[3]));
  for (; i < size; ++i) total += static_cast<double>(x[i]) * y[i];
  return total;
}

void combine(std::int64_t size, double alpha, const double* x, double scale, double* y) {
  const auto a = V::broadcast(alpha), s = V::broadcast(scale);
  std::int64_t i = 0;
  for (; i + V::width <= size; i += V::width)
    V::store(y + i, V::fma(a, V::load(x + i), s * V::load(y + i)));
  for (; i < size; ++i) y[i] = scale * y[i] + alpha * x[i];
}

constexpr VectorTable kernels{&dot<double>, &dot<float>, &combine};

}  // namespace

const VectorTable& table(const VectorTable*) { return kernels; }

}  // namespace jacpot::JACPOT_ISA
