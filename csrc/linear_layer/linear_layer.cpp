#include "linear_layer/linear_layer.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "linear_layer/kernels.hpp"

namespace jacpot::linear_layer {
namespace {

constexpr Status no_memory{Code::out_of_memory, "not enough memory to pack a linear layer"};
constexpr std::int64_t part_rows = 512;  // of W in a panel, which fits a small L2 cache

// The outputs [0, count) at which any of the K signals is not zero, or all of them, and the
// signals there: rows (C,), values (C, K). Returns C.
template <class T>
std::int64_t gather(const T* signals, std::int64_t k, std::int64_t stride, std::int64_t count,
                    bool zeros_too, std::int32_t* rows, T* values) {
  bool used[part_rows];
  std::fill_n(used, count, zeros_too);
  for (std::int64_t q = 0; q < k; ++q)
    for (std::int64_t o = 0; o < count; ++o) used[o] |= signals[q * stride + o] != T(0);
  std::int64_t c = 0;
  for (std::int64_t o = 0; o < count; ++o) {
    rows[c] = static_cast<std::int32_t>(o);
    c += used[o];
  }
  for (std::int64_t q = 0; q < k; ++q)
    for (std::int64_t i = 0; i < c; ++i) values[i * k + q] = signals[q * stride + rows[i]];
  return c;
}

// Asks for rows of a matrix, `columns` of each, before they are read.
template <class T>
void fetch(const T* w, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t line = 64 / sizeof(T);
  for (std::int64_t o = 0; o < rows; ++o, w += stride)
    for (std::int64_t i = 0; i < columns; i += line) __builtin_prefetch(w + i, 0, 2);
}

// What of W an example meets, part by part: at most `part_rows` rows each.
template <class T>
struct Lists {
  std::int64_t k, outputs, parts;
  Scratch<std::int32_t> rows;    // (N, outputs)
  Scratch<T> values;             // (N, outputs, K)
  Scratch<std::int64_t> counts;  // (N, parts)

  explicit Lists(const View<const T, 3>& signals)
      : k(signals.shape[1]),
        outputs(signals.shape[2]),
        parts(std::max<std::int64_t>(1, ceil_div(outputs, part_rows))),
        rows(allocate_scratch<std::int32_t>(signals.shape[0] * outputs)),
        values(allocate_scratch<T>(signals.size())),
        counts(allocate_scratch<std::int64_t>(signals.shape[0] * parts)) {}

  bool complete() const { return rows && values && counts; }
  std::int64_t size(std::int64_t part) const {
    return std::min(part_rows, outputs - part * part_rows);
  }
  std::int64_t begin(std::int64_t example, std::int64_t part) const {
    return example * outputs + part * part_rows;
  }
  void fill(std::int64_t example, const T* signals, std::int64_t stride) {
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t at = begin(example, part);
      counts[example * parts + part] = gather(signals + part * part_rows, k, stride, size(part),
                                              false, &rows[at], &values[at * k]);
    }
  }
};

}  // namespace

template <class T>
Status forward(View<const T, 2> x, View<const T, 2> weight, const T* bias, View<T, 2> y,
               int threads) {
  const auto& kernel = kernels_of<LinearLayerTable, T>();
  const std::int64_t n = x.shape[0], inputs = x.shape[1], outputs = weight.shape[0];
  const auto packed = allocate_scratch<T>(ceil_div(n, kernel.examples) * kernel.examples *
                                          ceil_div(inputs, kernel.width) * kernel.width);
  if (!packed) return no_memory;
  kernel.pack(x.data, x.stride[0], n, inputs, packed.get());
  // Rows of a task one after the other, which are fetched ahead, in tasks enough to share out.
  const std::int64_t tiles =
      std::clamp<std::int64_t>(outputs / (kernel.outputs * threads * 8), 1, 8);
  const std::int64_t rows = tiles * kernel.outputs;
  parallel_for(threads, ceil_div(outputs, rows), [&](std::int64_t task) {
    const std::int64_t o = task * rows;
    kernel.dots(packed.get(), n, inputs, weight.data + o * weight.stride[0], weight.stride[0],
                std::min(rows, outputs - o), bias ? bias + o : nullptr, y.data + o, y.stride[0]);
  });
  return {};
}

template <class T>
Status backward(View<const T, 3> signals, View<const T, 2> weight, View<T, 3> out, int threads) {
  const auto& kernel = kernels_of<LinearLayerTable, T>();
  const std::int64_t n = signals.shape[0], k = signals.shape[1], inputs = weight.shape[1];
  Lists<T> lists(signals);
  if (!lists.complete()) return no_memory;
  parallel_for(threads, n, [&](std::int64_t e) {
    lists.fill(e, signals.data + e * signals.stride[0], signals.stride[1]);
  });

  const std::int64_t panels = ceil_div(inputs, kernel.panel);
  std::atomic<bool> starved{false};
  parallel_for(threads, panels, [&](std::int64_t p) {
    const auto panel = allocate_scratch<T>(part_rows * kernel.panel);
    Scratch<std::int32_t> all_rows;
    Scratch<T> all_values;
    if (!panel) return starved.store(true);
    const std::int64_t column = p * kernel.panel;
    const std::int64_t columns = std::min(kernel.panel, inputs - column);
    for (std::int64_t part = 0; part < lists.parts; ++part) {
      const std::int64_t size = lists.size(part), o = part * part_rows;
      const bool finite = kernel.copy(weight.data + o * weight.stride[0] + column, weight.stride[0],
                                      size, columns, panel.get());
      if (!finite && !all_rows) {
        all_rows = allocate_scratch<std::int32_t>(part_rows);
        all_values = allocate_scratch<T>(part_rows * k);
        if (!all_rows || !all_values) return starved.store(true);
      }
      // While the examples meet this part, the next one comes: of this panel, or of the one that
      // this thread is likely to take then.
      const bool last = part + 1 == lists.parts;
      const std::int64_t next = last ? 0 : part + 1, next_size = lists.size(next);
      const std::int64_t next_column = last ? column + threads * kernel.panel : column;
      const std::int64_t next_columns = std::min(kernel.panel, inputs - next_column);
      const T* const ahead = weight.data + next * part_rows * weight.stride[0] + next_column;
      for (std::int64_t e = 0; e < n; ++e) {
        const std::int64_t first = e * next_size / n;
        fetch(ahead + first * weight.stride[0], weight.stride[0], (e + 1) * next_size / n - first,
              next_columns);
        T* to = out.data + e * out.stride[0] + column;
        const std::int64_t at = lists.begin(e, part);
        if (finite) {
          kernel.add_rows(&lists.rows[at], &lists.values[at * k],
                          lists.counts[e * lists.parts + part], k, panel.get(), columns, part == 0,
                          to, out.stride[1]);
        } else {
          gather(signals.data + e * signals.stride[0] + o, k, signals.stride[1], size, true,
                 all_rows.get(), all_values.get());
          kernel.add_rows(all_rows.get(), all_values.get(), size, k, panel.get(), columns,
                          part == 0, to, out.stride[1]);
        }
      }
    }
  });
  return starved ? no_memory : Status{};
}

template Status forward<float>(View<const float, 2>, View<const float, 2>, const float*,
                               View<float, 2>, int);
template Status forward<double>(View<const double, 2>, View<const double, 2>, const double*,
                                View<double, 2>, int);
template Status backward<float>(View<const float, 3>, View<const float, 2>, View<float, 3>, int);
template Status backward<double>(View<const double, 3>, View<const double, 2>, View<double, 3>,
                                 int);

}  // namespace jacpot::linear_layer
