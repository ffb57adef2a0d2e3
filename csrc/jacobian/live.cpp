#include "jacobian/live.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "common/parallel.hpp"
#include "jacobian/live_signals.hpp"
#include "jacobian/products.hpp"
#include "jacobian/sparse_products.hpp"

namespace jacpot {
namespace {

constexpr std::int64_t sums_bytes = 16 << 20;  // of Σ_k u_k δ_k between the two halves of Jᵀu
constexpr std::int64_t most_rows = 256, fewest_rows = 64;  // for which a panel of V is packed
constexpr std::int64_t fetched_bytes = 512 << 10;  // of these rows' signals, half of a second cache

// The columns of panels: all inputs in parts of whole vectors that differ by one at most.
struct Columns {
  std::int64_t inputs, width, vectors, parts;

  Columns(std::int64_t count, std::int64_t of_a_vector, std::int64_t most)
      : inputs(count),
        width(of_a_vector),
        vectors(ceil_div(inputs, width)),
        parts(ceil_div(vectors, most)) {}
  std::int64_t first_vector(std::int64_t part) const { return part * vectors / parts; }
  std::int64_t begin(std::int64_t part) const { return first_vector(part) * width; }
  std::int64_t size_in_vectors(std::int64_t part) const {
    return first_vector(part + 1) - first_vector(part);
  }
  std::int64_t size(std::int64_t part) const {
    return std::min(inputs, begin(part + 1)) - begin(part);
  }
};

// Each worker takes the next task until there is none.
template <class F>
void for_workers(int threads, std::int64_t tasks, F&& body) {
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(worker, task);
  });
}

void add_up(std::int64_t* counts, std::int64_t size) {  // counts[i + 1] -> where i + 1 begins
  counts[0] = 0;
  for (std::int64_t i = 0; i < size; ++i) counts[i + 1] += counts[i];
}

}  // namespace

template <class T>
void LiveLayer<T>::count(const View<const T, 5>& signals, std::int64_t row_block,
                         std::uint8_t* live) {
  std::uint64_t* of_units = rows_of_units_.get() + row_block * units();
  std::fill_n(of_units, units(), std::uint64_t{0});
  for (std::int64_t row = row_block * block; row < std::min(rows(), (row_block + 1) * block);
       ++row) {
    std::uint8_t* own = live + row * units();
    std::fill_n(own, units(), std::uint8_t{0});
    std::int64_t total = 0;
    for (std::int64_t g = 0; g < groups; ++g, own += outputs) {
      for (std::int64_t q = 0; q < k; ++q) {
        const T* from = &signals(row / positions, q, row % positions, g, 0);
        for (std::int64_t o = 0; o < outputs; ++o) own[o] |= from[o * signals.stride[4]] != T(0);
      }
      for (std::int64_t b = 0; b < unit_blocks(); ++b) {
        std::int64_t in_block = 0;
        for (std::int64_t o = b * block; o < std::min(outputs, (b + 1) * block); ++o) {
          in_block += own[o];
          of_units[g * outputs + o] |= std::uint64_t{own[o]} << (row - row_block * block);
        }
        row_begins_[(g * unit_blocks() + b) * rows() + row + 1] = in_block;
        total += in_block;
      }
    }
    starts_[row + 1] = total;
  }
}

template <class T>
void LiveLayer<T>::fill(const View<const T, 5>& signals, std::int64_t row_block,
                        const std::uint8_t* live) {
  for (std::int64_t row = row_block * block; row < std::min(rows(), (row_block + 1) * block);
       ++row) {
    const std::int64_t example = row / positions, first = starts_[example * positions],
                       length = starts_[(example + 1) * positions] - first;
    T* values = signals_.get() + k * first + starts_[row] - first;
    for (std::int64_t g = 0; g < groups; ++g)
      for (std::int64_t b = 0; b < unit_blocks(); ++b) {
        const std::int64_t begin = row_begins(g, b)[row], size = row_begins(g, b)[row + 1] - begin;
        std::uint8_t* places = row_entries_.get() + begin;
        for (std::int64_t o = b * block, i = 0; i < size; ++o) {
          places[i] = static_cast<std::uint8_t>(o - b * block);
          i += live[row * units() + g * outputs + o];
        }
        for (std::int64_t q = 0; q < k; ++q) {
          const T* from = &signals(example, q, row % positions, g, b * block);
          for (std::int64_t i = 0; i < size; ++i)
            values[q * length + i] = from[places[i] * signals.stride[4]];
        }
        values += size;
      }
  }
}

template <class T>
Status LiveLayer<T>::make(View<const T, 5> signals, const T* activations, std::int64_t inputs,
                          const std::int64_t* row_offsets, const std::int32_t* columns, bool bias,
                          double most, int threads, std::optional<LiveLayer>& out) {
  LiveLayer l;
  l.n = signals.shape[0];
  l.k = signals.shape[1];
  l.positions = signals.shape[2];
  l.groups = signals.shape[3];
  l.outputs = signals.shape[4];
  l.inputs = inputs;
  l.activations = activations;
  l.row_offsets = row_offsets;
  l.columns = columns;
  l.bias = bias;
  const std::int64_t rows = l.rows(), of_rows = l.groups * l.unit_blocks() * rows;
  l.starts_ = allocate_scratch<std::int64_t>(rows + 1);
  l.row_begins_ = allocate_scratch<std::int64_t>(of_rows + 1);
  l.rows_of_units_ = allocate_scratch<std::uint64_t>(l.row_blocks() * l.units());
  const auto live = allocate_scratch<std::uint8_t>(rows * l.units());
  if (!l.starts_ || !l.row_begins_ || !l.rows_of_units_ || !live) return no_memory_for_products;
  parallel_for(threads, l.row_blocks(),
               [&](std::int64_t row_block) { l.count(signals, row_block, live.get()); });
  add_up(l.starts_.get(), rows);
  add_up(l.row_begins_.get(), of_rows);
  const std::int64_t total = l.starts_[rows];
  if (static_cast<double>(total) > most * static_cast<double>(rows * l.units())) return {};
  l.row_entries_ = allocate_scratch<std::uint8_t>(total);
  l.signals_ = allocate_scratch<T>(l.k * total);
  if (!l.row_entries_ || !l.signals_) return no_memory_for_products;
  parallel_for(threads, l.row_blocks(),
               [&](std::int64_t row_block) { l.fill(signals, row_block, live.get()); });
  out = std::move(l);
  return {};
}

template <class T>
std::int64_t LiveLayer<T>::bytes() const {
  const std::int64_t lists = rows() * (1 + groups * unit_blocks()) + row_blocks() * units() + 2;
  return size() * (k * std::int64_t{sizeof(T)} + 1) + lists * std::int64_t{sizeof(std::int64_t)};
}

template <class T>
Status jvp(const LiveLayer<T>& l, const T* v, std::int64_t r, T* out, int threads) {
  if (l.size() == 0 || r == 0) return {};
  if (l.row_offsets) return sparse_jvp(l, LiveSignals<T>{l}, v, r, out, threads);
  const auto& kernel = kernels_of<LiveTable, T>();
  const Columns columns(l.inputs, kernel.width, kernel.most_vectors);
  const std::int64_t width = l.groups * l.inputs;
  // Whole examples, as many as make packing cheap and are shared out evenly.
  const std::int64_t of_signals = ceil_div(l.size() * l.k * std::int64_t{sizeof(T)}, l.rows());
  const std::int64_t wanted =
      std::clamp(std::min(most_rows / r, fetched_bytes / of_signals), fewest_rows, most_rows);
  const std::int64_t tasks = std::min(l.n, ceil_div(ceil_div(l.rows(), wanted), threads) * threads);
  std::int64_t widest = 0, tallest = ceil_div(l.n, tasks) * l.positions;
  const auto first_row = [&](std::int64_t task) { return task * l.n / tasks * l.positions; };
  for (std::int64_t task = 0; task < tasks; ++task)
    widest = std::max(widest, l.starts()[first_row(task + 1)] - l.starts()[first_row(task)]);
  const std::int64_t panel_size = l.block * kernel.most_vectors * kernel.width;
  const auto panels = allocate_scratch<T>(threads * panel_size);
  const auto products = allocate_scratch<T>(threads * r * widest);
  const auto places = allocate_scratch<std::int64_t>(threads * tallest);
  if (!panels || !products || !places) return no_memory_for_products;
  for_workers(threads, tasks, [&](std::int64_t worker, std::int64_t task) {
    T* panel = panels.get() + worker * panel_size;
    T* z = products.get() + worker * r * widest;  // V a, (R, live)
    std::int64_t* at = places.get() + worker * tallest;
    const std::int64_t first = first_row(task), end = first_row(task + 1);
    const std::int64_t *starts = l.starts() + first, count = starts[end - first] - starts[0];
    const auto go_to_start = [&] {
      for (std::int64_t i = 0; i < end - first; ++i) at[i] = starts[i] - starts[0];
    };
    const auto pass = [&](const std::int64_t* begins) {
      for (std::int64_t i = 0; i < end - first; ++i) at[i] += begins[i + 1] - begins[i];
    };

    if (l.bias) {
      go_to_start();
      for (std::int64_t g = 0; g < l.groups; ++g)
        for (std::int64_t b = 0; b < l.unit_blocks(); ++b) {
          const std::int64_t* begins = l.row_begins(g, b) + first;
          for (std::int64_t j = 0; j < r; ++j) {
            const T* bias = v + j * l.parameters() + l.weights() + g * l.outputs + b * l.block;
            for (std::int64_t i = 0; i < end - first; ++i) {
              T* to = z + j * count + at[i];
              for (std::int64_t e = begins[i]; e < begins[i + 1]; ++e)
                *to++ = bias[l.units_of_rows()[e]];
            }
          }
          pass(begins);
        }
    } else {
      std::fill_n(z, r * count, T(0));
    }
    // A panel of V, and rows of activations.
    const auto of_weight = [&](std::int64_t part, std::int64_t panel_index) {
      const std::int64_t j = panel_index % r, b = panel_index / r % l.unit_blocks(),
                         g = panel_index / r / l.unit_blocks();
      return LiveRows<T>{
          v + j * l.parameters() + (g * l.outputs + b * l.block) * l.inputs + columns.begin(part),
          l.inputs, std::min(l.block, l.outputs - b * l.block), columns.size(part)};
    };
    const auto seen = [&](std::int64_t part, std::int64_t g) {
      return LiveRows<T>{l.activations + first * width + g * l.inputs + columns.begin(part), width,
                         end - first, columns.size(part)};
    };
    const std::int64_t panels_of_part = l.groups * l.unit_blocks() * r;
    // The signals come while the last of the products are computed.
    const auto share_of_signals = [&](std::int64_t panel_index) {
      const std::int64_t share = ceil_div(l.k * count, panels_of_part * (end - first));
      return LiveRows<T>{l.signals() + l.k * starts[0] + panel_index * (end - first) * share, share,
                         end - first, share};
    };
    for (std::int64_t part = 0; part < columns.parts; ++part) {
      go_to_start();
      for (std::int64_t i = 0; i < panels_of_part; ++i) {
        const std::int64_t j = i % r, b = i / r % l.unit_blocks(), g = i / r / l.unit_blocks(),
                           vectors = columns.size_in_vectors(part);
        const LiveRows<T> from = of_weight(part, i), x = seen(part, g);
        const LiveRows<T> ahead = i + 1 < panels_of_part     ? of_weight(part, i + 1)
                                  : part + 1 < columns.parts ? seen(part + 1, 0)
                                                             : LiveRows<T>{};
        const LiveRows<T> later = part + 1 < columns.parts ? LiveRows<T>{} : share_of_signals(i);
        kernel.pack(vectors, from, panel);
        kernel.dots(vectors, panel, l.row_begins(g, b) + first, l.units_of_rows(), x, at,
                    z + j * count, ahead, later);
        if (j + 1 == r) pass(l.row_begins(g, b) + first);
      }
    }
    for (std::int64_t example = first / l.positions; example < end / l.positions; ++example) {
      const std::int64_t begin = l.starts()[example * l.positions],
                         length = l.starts()[(example + 1) * l.positions] - begin;
      kernels_of<ProductTable, T>().dot(l.signals() + l.k * begin, l.k, length, length,
                                        z + begin - starts[0], r, count, false,
                                        out + example * l.k * r);
    }
  });
  return {};
}

template <class T>
Status vjp(const LiveLayer<T>& l, const T* u, std::int64_t r, T* out, int threads) {
  if (l.size() == 0 || r == 0) {
    std::fill_n(out, r * l.parameters(), T(0));
    return {};
  }
  if (l.row_offsets) return sparse_vjp(l, LiveSignals<T>{l}, u, r, out, threads);
  const auto& kernel = kernels_of<LiveTable, T>();
  const Columns columns(l.inputs, kernel.width, kernel.most_vectors);
  const std::int64_t width = l.groups * l.inputs, units = l.units();
  // What is summed into the gradient of a span of units and of a part of the columns is a task.
  const std::int64_t per_group =
      std::clamp(ceil_div(4 * threads, std::max<std::int64_t>(1, r * l.groups * columns.parts)),
                 std::int64_t{1}, l.unit_blocks());
  const std::int64_t spans = l.groups * per_group;
  const std::int64_t tile_size = units * l.block;  // Σ_k u_k δ_k of a block of rows, (G·O, rows)
  const std::int64_t at_once = std::clamp(sums_bytes / (r * tile_size * std::int64_t{sizeof(T)}),
                                          std::int64_t{1}, l.row_blocks());
  const std::int64_t panel_size = l.block * kernel.most_vectors * kernel.width;
  const std::int64_t held_size =
      panel_size + ceil_div(l.outputs, per_group) * kernel.most_vectors * kernel.width;
  const auto tiles = allocate_scratch<T>(at_once * r * tile_size);
  const auto combined = allocate_scratch<T>(threads * r * tile_size);
  const auto held = allocate_scratch<T>(threads * held_size);
  if (!tiles || !combined || !held) return no_memory_for_products;

  for (std::int64_t first = 0; first < l.row_blocks(); first += at_once) {
    const std::int64_t count = std::min(at_once, l.row_blocks() - first);
    for_workers(threads, count, [&](std::int64_t worker, std::int64_t task) {
      const std::int64_t begin = (first + task) * l.block,
                         end = std::min(l.rows(), begin + l.block), from = l.starts()[begin],
                         live = l.starts()[end] - from;
      T* own = combined.get() + worker * r * tile_size;  // (R, live units of these rows)
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t example = row / l.positions, start = l.starts()[example * l.positions],
                           length = l.starts()[(example + 1) * l.positions] - start,
                           at = l.starts()[row];
        kernels_of<ProductTable, T>().combine(l.signals() + l.k * start + at - start, l.k, length,
                                              l.starts()[row + 1] - at, u + example * l.k * r, r,
                                              live, false, own + at - from);
      }
      // A block of units at a time, that stays in the first cache while all the rows reach it.
      for (std::int64_t j = 0; j < r; ++j, own += live) {
        T* tile = tiles.get() + (task * r + j) * tile_size;
        std::int64_t next[LiveLayer<T>::block];  // of what is left of each row
        for (std::int64_t row = begin; row < end; ++row) next[row - begin] = l.starts()[row] - from;
        for (std::int64_t g = 0; g < l.groups; ++g)
          for (std::int64_t b = 0; b < l.unit_blocks(); ++b) {
            const std::int64_t* begins = l.row_begins(g, b) + begin;
            T* of_block = tile + (g * l.outputs + b * l.block) * l.block;
            std::fill_n(of_block, std::min(l.block, l.outputs - b * l.block) * l.block, T(0));
            for (std::int64_t i = 0; i < end - begin; ++i) {
              const T* values = own + next[i];
              next[i] += begins[i + 1] - begins[i];
              for (std::int64_t e = begins[i]; e < begins[i + 1]; ++e)
                of_block[l.units_of_rows()[e] * l.block + i] = *values++;
            }
          }
      }
    });

    for_workers(threads, r * spans * columns.parts, [&](std::int64_t worker, std::int64_t task) {
      const std::int64_t part = task % columns.parts, span = task / columns.parts % spans,
                         j = task / columns.parts / spans, g = span / per_group,
                         begin = span % per_group * l.outputs / per_group,
                         end = (span % per_group + 1) * l.outputs / per_group,
                         vectors = columns.size_in_vectors(part), size = columns.size(part);
      T* panel = held.get() + worker * held_size;
      T* sums = panel + panel_size;
      std::fill_n(sums, (end - begin) * vectors * kernel.width, T(0));
      const auto rows_of = [&](std::int64_t i) {
        const std::int64_t row = (first + i) * l.block;
        return LiveRows<T>{l.activations + row * width + g * l.inputs + columns.begin(part), width,
                           std::min(l.block, l.rows() - row), size};
      };
      for (std::int64_t i = 0; i < count; ++i) {
        const LiveRows<T> x = rows_of(i);
        kernel.pack(vectors, x, panel);
        kernel.sums(vectors, panel, l.rows_of_units(first + i) + g * l.outputs + begin, end - begin,
                    tiles.get() + (i * r + j) * tile_size + (g * l.outputs + begin) * l.block, sums,
                    i + 1 < count ? rows_of(i + 1) : LiveRows<T>{});
      }
      T* to = out + j * l.parameters() + (g * l.outputs + begin) * l.inputs + columns.begin(part);
      for (std::int64_t o = 0; o < end - begin; ++o, to += l.inputs) {
        const T* from = sums + o * vectors * kernel.width;
        for (std::int64_t c = 0; c < size; ++c) to[c] = first ? to[c] + from[c] : from[c];
      }
    });
    if (l.bias)
      parallel_for(threads, r * ceil_div(units, l.block), [&](std::int64_t task) {
        const std::int64_t j = task % r, begin = task / r * l.block;
        for (std::int64_t unit = begin; unit < std::min(units, begin + l.block); ++unit) {
          constexpr int lanes = 16;
          T sums[lanes] = {}, total = 0;
          for (std::int64_t i = 0; i < count; ++i) {
            const T* from = tiles.get() + (i * r + j) * tile_size + unit * l.block;
            for (std::int64_t e = 0; e < l.block; e += lanes)
              for (int lane = 0; lane < lanes; ++lane) sums[lane] += from[e + lane];
          }
          for (const T sum : sums) total += sum;
          T& to = out[j * l.parameters() + l.weights() + unit];
          to = first ? to + total : total;
        }
      });
  }
  return {};
}

template class LiveLayer<float>;
template class LiveLayer<double>;
template Status jvp<float>(const LiveLayer<float>&, const float*, std::int64_t, float*, int);
template Status jvp<double>(const LiveLayer<double>&, const double*, std::int64_t, double*, int);
template Status vjp<float>(const LiveLayer<float>&, const float*, std::int64_t, float*, int);
template Status vjp<double>(const LiveLayer<double>&, const double*, std::int64_t, double*, int);

}  // namespace jacpot
