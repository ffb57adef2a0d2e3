#include "subset_sum/subset_sum.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace jacpot::subset_sum {
namespace {

using Subset = std::uint16_t;

// Sums in rising order, and which numbers each is the sum of.
struct Sums {
  double* value;
  Subset* subset;
};

// `plain`, or `shifted` with its bit: by arithmetic, since no branch predictor can guess which.
inline Subset chosen(Subset plain, Subset shifted, std::int64_t second, Subset bit) {
  const unsigned mask = 0u - static_cast<unsigned>(second);
  return static_cast<Subset>((plain & ~mask) | ((shifted | bit) & mask));
}

// One merge from the front and one from the back, interleaved: two chains of dependent loads and
// compares in flight instead of one, and as each makes half of the output neither can run past
// the end of an input, so there is nothing to predict.
void merge_shifted(Sums in, std::int64_t count, double shift, Subset bit, Sums out) {
  // The inputs are `in` and `in + shift`, both sorted; the second is never written down.
  std::int64_t low = 0, low_shifted = 0;
  std::int64_t high = count - 1, high_shifted = count - 1;
  for (std::int64_t k = 0; k < count; ++k) {
    const double a = in.value[low], b = in.value[low_shifted] + shift;
    const std::int64_t second = b < a;
    out.value[k] = std::min(a, b);
    out.subset[k] = chosen(in.subset[low], in.subset[low_shifted], second, bit);
    low_shifted += second;
    low += 1 - second;

    const double c = in.value[high], d = in.value[high_shifted] + shift;
    const std::int64_t last = !(d < c);  // the mirror image, so that equal sums are taken once each
    out.value[2 * count - 1 - k] = std::max(c, d);
    out.subset[2 * count - 1 - k] = chosen(in.subset[high], in.subset[high_shifted], last, bit);
    high_shifted -= last;
    high -= 1 - last;
  }
}

// All 2^n sums of n numbers, in one of the two buffers.
template <class T>
Sums sorted_sums(const T* numbers, std::int64_t stride, int n, Sums a, Sums b) {
  a.value[0] = 0;
  a.subset[0] = 0;
  for (int j = 0; j < n; ++j) {
    merge_shifted(a, std::int64_t{1} << j, static_cast<double>(numbers[j * stride]),
                  static_cast<Subset>(1u << j), b);
    std::swap(a, b);
  }
  return a;
}

struct Pair {
  double distance;
  std::int64_t left, right;

  void offer(double other, std::int64_t i, std::int64_t j) {
    if (other < distance) *this = {other, i, j};  // rare
  }
};

// left[i] + right[j] nearest to the target. The lower half of `left` is walked upwards and the
// upper half downwards, again for two chains at a time.
Pair nearest_pair(Sums left, std::int64_t n_left, Sums right, std::int64_t n_right, double target) {
  Pair up{HUGE_VAL, 0, 0}, down{HUGE_VAL, 0, 0};
  const std::int64_t middle = n_left / 2;
  std::int64_t i = 0, j = n_right - 1, k = n_left - 1, l = 0;
  const auto step_up = [&] {
    const double over = (left.value[i] + right.value[j]) - target;
    up.offer(std::fabs(over), i, j);
    const std::int64_t above = over > 0;
    j -= above;
    i += 1 - above;
  };
  const auto step_down = [&] {
    const double over = (left.value[k] + right.value[l]) - target;
    down.offer(std::fabs(over), k, l);
    const std::int64_t above = over > 0;
    k -= above;
    l += 1 - above;
  };
  while (i < middle && j >= 0 && k >= middle && l < n_right) {
    step_up();
    step_down();
  }
  while (i < middle && j >= 0) step_up();
  while (k >= middle && l < n_right) step_down();
  return down.distance < up.distance ? down : up;
}

}  // namespace

template <class T>
Status nearest(View<const T, 2> samples, View<const T, 1> targets, std::int64_t* subsets,
               double* sums, int threads) {
  const std::int64_t rows = samples.shape[0], n = samples.shape[1], stride = samples.stride[1];
  if (n > max_samples) return {Code::unsupported, "at most 32 samples a target"};
  const int n_left = static_cast<int>(n / 2), n_right = static_cast<int>(n) - n_left;
  const std::int64_t size = std::int64_t{1} << n_right;

  constexpr std::int64_t rows_a_task = 64;
  const std::int64_t tasks = (rows + rows_a_task - 1) / rows_a_task;
  std::atomic<bool> out_of_memory{false};
  parallel_for(threads, tasks, [&](std::int64_t task) {
    const auto values = allocate_scratch<double>(4 * size);
    const auto chosen = allocate_scratch<Subset>(4 * size);
    if (!values || !chosen) {
      out_of_memory = true;
      return;
    }
    const auto buffer = [&](int b) {
      return Sums{values.get() + b * size, chosen.get() + b * size};
    };
    for (std::int64_t m = task * rows_a_task; m < std::min(rows, (task + 1) * rows_a_task); ++m) {
      const T* row = samples.data + m * samples.stride[0];
      const Sums left = sorted_sums(row, stride, n_left, buffer(0), buffer(1));
      const Sums right = sorted_sums(row + n_left * stride, stride, n_right, buffer(2), buffer(3));
      const Pair best = nearest_pair(left, std::int64_t{1} << n_left, right, size,
                                     static_cast<double>(targets.data[m * targets.stride[0]]));
      const std::int64_t subset = static_cast<std::int64_t>(left.subset[best.left]) |
                                  static_cast<std::int64_t>(right.subset[best.right]) << n_left;
      double sum = 0;
      for (std::int64_t j = 0; j < n; ++j)
        if (subset >> j & 1) sum += static_cast<double>(row[j * stride]);
      subsets[m] = subset;
      sums[m] = sum;
    }
  });
  if (out_of_memory) return {Code::out_of_memory, "no memory for the sums of the halves"};
  return {};
}

template Status nearest<float>(View<const float, 2>, View<const float, 1>, std::int64_t*, double*,
                               int);
template Status nearest<double>(View<const double, 2>, View<const double, 1>, std::int64_t*,
                                double*, int);

}  // namespace jacpot::subset_sum
