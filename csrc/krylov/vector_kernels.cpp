#include "krylov/vector_kernels.hpp"

#include "common/shuffle.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

using V = Simd<double>;

double dot(std::int64_t size, const double* x, const double* y) {
  constexpr int chains = 4;  // they hide the latency of the additions
  V::Vec sum[chains];
  for (auto& s : sum) s = V::zero();
  std::int64_t i = 0;
  for (; i + chains * V::width <= size; i += chains * V::width)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      const auto at = i + c * V::width;
      sum[c] = V::fma(V::load(x + at), V::load(y + at), sum[c]);
    }
  double total = Shuffle<double>::sum(sum[0] + sum[1] + (sum[2] + sum[3]));
  for (; i < size; ++i) total += x[i] * y[i];
  return total;
}

void combine(std::int64_t size, double alpha, const double* x, double scale, double* y) {
  const auto a = V::broadcast(alpha), s = V::broadcast(scale);
  std::int64_t i = 0;
  for (; i + V::width <= size; i += V::width)
    V::store(y + i, V::fma(a, V::load(x + i), s * V::load(y + i)));
  for (; i < size; ++i) y[i] = scale * y[i] + alpha * x[i];
}

template <class S>
void load(std::int64_t size, double factor, const double* from, S* to) {
  for (std::int64_t i = 0; i < size; ++i) to[i] = static_cast<S>(factor * from[i]);
}

template <class S>
void add_up(std::int64_t size, std::int64_t count, const S* from, std::int64_t stride, double* to) {
  for (std::int64_t i = 0; i < size; ++i) to[i] = from[i];
  for (std::int64_t k = 1; k < count; ++k)
    for (std::int64_t i = 0; i < size; ++i) to[i] += from[k * stride + i];
}

constexpr VectorTable kernels{
    &dot, &combine, {&load<float>, &add_up<float>}, {&load<double>, &add_up<double>}};

}  // namespace

const VectorTable& table(const VectorTable*) { return kernels; }

}  // namespace jacpot::JACPOT_ISA
