#include "masked_matmul/masked_matmul.hpp"

#include "masked_matmul/walk.hpp"

namespace jacpot::masked_matmul {

template <class T>
Status forward(const Pattern& pattern, const T* values, const T* bias, bool relu,
               Activations<const T> x, Activations<T> y, int threads) {
  const Panelling<T> panels(x.examples, kernels_of<MaskedMatmulTable, T>().forward);
  threads = team(threads, pattern.rows.nnz, x.examples);
  return in_row_tiles(
      pattern, values, panels.width(), threads, [&](const Lines& lines, const T* in_order) {
        return multiply(
            lines, in_order, bias, relu, panels, threads,
            [&](std::int64_t p, std::int64_t first, std::int64_t last, T* panel) {
              panels.shape(p).pack(x, panels.example(p), first, last, panel);
            },
            [&](std::int64_t p, std::int64_t first, std::int64_t last, const T* panel) {
              panels.shape(p).unpack(panel, panels.example(p), first, last, y);
            });
      });
}

template <class T>
Status backward(const Pattern& pattern, const T* values, Activations<const T> x,
                Activations<const T> dy, Activations<T> dx, T* d_values, int threads) {
  const Lines& lines = pattern.column_tiles;
  const Panelling<T> panels(dy.examples, d_values ? kernels_of<MaskedMatmulTable, T>().backward
                                                  : kernels_of<MaskedMatmulTable, T>().forward);
  threads = team(threads, lines.nnz, dy.examples);
  const auto loader = [&](const Activations<const T>& from) {
    return [&](std::int64_t p, std::int64_t first, std::int64_t last, T* panel) {
      panels.shape(p).pack(from, panels.example(p), first, last, panel);
    };
  };
  const auto store_dx = [&](std::int64_t p, std::int64_t first, std::int64_t last, const T* panel) {
    panels.shape(p).unpack(panel, panels.example(p), first, last, dx);
  };
  return in_column_order(
      pattern, values, dx.data != nullptr, d_values, threads, [&](const T* by_column, T* gradient) {
        if (!gradient && by_column)  // alone it is a product like the forward one
          return multiply<T>(lines, by_column, nullptr, false, panels, threads, loader(dy),
                             store_dx);
        return walk_columns(lines, by_column, gradient, panels, 1, threads, loader(x), loader(dy),
                            store_dx);
      });
}

template Status forward<float>(const Pattern&, const float*, const float*, bool,
                               Activations<const float>, Activations<float>, int);
template Status forward<double>(const Pattern&, const double*, const double*, bool,
                                Activations<const double>, Activations<double>, int);
template Status backward<float>(const Pattern&, const float*, Activations<const float>,
                                Activations<const float>, Activations<float>, float*, int);
template Status backward<double>(const Pattern&, const double*, Activations<const double>,
                                 Activations<const double>, Activations<double>, double*, int);

}  // namespace jacpot::masked_matmul
