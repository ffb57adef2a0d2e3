#include "jacobian/gram.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/blas.hpp"
#include "common/huge_pages.hpp"
#include "common/kept_memory.hpp"
#include "common/parallel.hpp"
#include "jacobian/gram_pack.hpp"

namespace jacpot {
namespace {

constexpr Status no_memory{Code::out_of_memory, "not enough memory for the packed factors"};
constexpr std::int64_t tile_bytes = 160 << 10;
constexpr std::int64_t tiles_per_thread = 4;
constexpr std::int64_t streamed_bytes = 32 << 20;  // of a result that no cache holds
constexpr std::int64_t few_tiles = 16;             // fewer than these are cut into parts
// Of each part, for each number of the result, which it writes and which is added up.
constexpr double least_multiplications = 1000;

// Signals that are the same for all examples: those of a last linear layer.
template <class T>
bool is_constant(const GramFactors<T>& f, std::int64_t n, std::int64_t k, std::int64_t outputs) {
  if (f.signals_example == 0) return true;
  for (std::int64_t i = 1; i < n; ++i)
    for (std::int64_t j = 0; j < k; ++j)
      if (std::memcmp(f.signals + i * f.signals_example + j * f.signals_output,
                      f.signals + j * f.signals_output,
                      static_cast<std::size_t>(outputs) * sizeof(T)) != 0)
        return false;
  return true;
}

template <class T>
void constant_products(const GramLayer<T>& layer, const GramFactors<T>& right, std::int64_t k,
                       bool trace, T* out) {
  if (trace) out[0] = 0;
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (std::int64_t o = 0; o < layer.outputs; ++o)
        sum += static_cast<double>(layer.left.signals[i * layer.left.signals_output + o]) *
               static_cast<double>(right.signals[j * right.signals_output + o]);
      if (!trace)
        out[i * k + j] = static_cast<T>(sum);
      else if (i == j)
        out[0] += static_cast<T>(sum);
    }
}

// Whether products over the active units alone pay. Their costs are counted in products of vectors:
// to gather a unit of a row takes about two, and serves all columns of a tile; to list the units
// that are active on both sides takes less than half a product for each unit there is; and where
// all are active, tiles of one row's outputs take some hundredths longer than full ones.
template <class T>
bool skipping_pays(const Census& left, const Census& right, const GramPlan<T>& plan,
                   const GramKernels<T>& kernel) {
  const auto share = [](const Census& found) {
    return static_cast<double>(found.active) / static_cast<double>(found.all);
  };
  const auto outputs = static_cast<double>(plan.slice);
  const double width = static_cast<double>(kernel.panel / kernel.vectors);
  // Rows of different examples whose signals share a vector, as if they knew nothing of another.
  const double together = std::max(1.0, (width + outputs - 1) / outputs);
  const double either = 1 - std::pow(1 - share(right), together);
  const double columns = static_cast<double>(std::min(plan.m, kernel.panel)) * outputs / width;
  return share(left) * (either * outputs + 2 / columns) + 0.4 < 0.95 * outputs;
}

// Tiles whose rows are late, or all others. Of those that end in late rows if mirrored, the
// mirrored half has to wait.
template <class T>
std::vector<GramTile> tiles_of(const GramPlan<T>& plan, std::int64_t panel, GramOutputs outputs,
                               std::int64_t late, bool are_late) {
  std::vector<GramTile> tiles;
  const bool full = outputs == GramOutputs::full;
  const std::int64_t left_groups = ceil_div(plan.n, panel), right_groups = ceil_div(plan.m, panel);
  for (std::int64_t j = 0; j < right_groups; ++j)
    for (std::int64_t i = are_late ? late : 0;
         i < std::min(plan.symmetric ? j + 1 : left_groups, are_late ? left_groups : late); ++i)
      for (std::int64_t first = 0; first < std::min(panel, plan.n - i * panel); first += plan.chunk)
        for (std::int64_t p = 0; p < plan.slices; p += plan.pairs)
          for (std::int64_t q = full ? 0 : p; q < (full ? plan.slices : p + 1); ++q)
            tiles.push_back({i, first, j, p, q, std::min(plan.pairs, plan.slices - p),
                             plan.symmetric && (are_late || j < late)});
  return tiles;
}

}  // namespace

template <class T>
Status PackedGram<T>::pack(const GramProblem<T>& problem, int threads) {
  const std::vector<GramLayer<T>>& layers = problem.layers;
  const std::int64_t n = problem.n, m = problem.m, k = problem.k;
  const GramOutputs outputs = problem.outputs;
  const bool symmetric = problem.symmetric;
  if (n == 0 || m == 0 || k == 0) return {};
  kernel_ = &kernels_of<GramTable, T>();
  outputs_ = outputs;
  const std::int64_t panel = kernel_->panel;
  const bool full = outputs == GramOutputs::full, trace = outputs == GramOutputs::trace;

  GramPlan<T>& plan = plan_;
  plan.symmetric = symmetric;
  plan.n = n;
  plan.m = m;
  plan.width = trace ? 1 : k;
  plan.slices = full ? ceil_div(k, gram_max_slice) : plan.width;
  plan.slice = full ? ceil_div(k, plan.slices) : 1;
  plan.slices = ceil_div(plan.width, plan.slice);
  plan.pairs = outputs == GramOutputs::diagonal ? std::min(plan.slices, gram_max_slice) : 1;
  const std::int64_t block_bytes = kernel_->block * plan.slice * panel * plan.slice * plan.pairs *
                                   static_cast<std::int64_t>(sizeof(T));
  plan.chunk = std::clamp(tile_bytes / block_bytes, std::int64_t{1}, panel / kernel_->block) *
               kernel_->block;
  // Fewer examples a tile where there are few tiles: threads share them, and less is computed
  // twice.
  const std::int64_t most = ceil_div(n * ceil_div(m, panel), tiles_per_thread * threads);
  plan.chunk = std::min(plan.chunk, ceil_div(most, kernel_->block) * kernel_->block);
  plan.row_example = full ? k * m * k : trace ? m : m * k;
  plan.row_output = full ? m * k : 1;
  plan.column_example = trace ? 1 : k;
  plan.column_output = full ? 1 : 0;
  plan.streams = n * plan.row_example * static_cast<std::int64_t>(sizeof(T)) > streamed_bytes;
  plan.out = problem.out;

  std::int64_t size = 0;  // of a group
  std::int64_t terms = 0;
  double multiplications = 0;
  for (const GramLayer<T>& layer : layers) {
    const GramFactors<T>& right = symmetric ? layer.left : layer.right;
    const bool constant = layer.positions == 1 && !layer.row_offsets &&
                          is_constant(layer.left, n, k, layer.outputs) &&
                          (symmetric || is_constant(right, m, k, layer.outputs));
    PackedLayer<T> packed{};
    packed.positions = layer.positions;
    packed.inputs = layer.inputs;
    packed.outputs = layer.outputs;
    packed.inner = layer.outputs * (trace ? k : 1);
    packed.row_offsets = layer.row_offsets;
    packed.columns = layer.columns;
    packed.bias = layer.bias;
    packed.activations = size;
    size += layer.positions * layer.inputs * panel;
    if (constant) {
      T* products = room(plan.width * plan.width);
      if (!products) return no_memory;
      constant_products(layer, right, k, trace, products);
      packed.constant = products;
    } else {
      packed.signals = size;
      packed.signals_slice = layer.positions * plan.slice * packed.inner * panel;
      size += plan.slices * packed.signals_slice;
      packed.active = size;
      packed.words = ceil_div(packed.inner, 64);
      if (plan.slice > 1)
        size += ceil_div(plan.slices * layer.positions * panel * packed.words *
                             static_cast<std::int64_t>(sizeof(std::uint64_t)),
                         static_cast<std::int64_t>(scratch_alignment)) *
                static_cast<std::int64_t>(scratch_alignment / sizeof(T));
    }
    layers_.push_back(packed);
    const std::int64_t a = layer.row_offsets
                               ? layer.row_offsets[layer.outputs] - layer.row_offsets[0]
                               : layer.inputs,
                       s = constant ? 0 : layer.outputs * k * (full ? k : 1);
    multiplications += static_cast<double>(n * layer.positions) *
                       static_cast<double>(m * layer.positions) * static_cast<double>(a + s);
    terms += ceil_div(m * layer.positions, panel);
  }
  // By the smallest tiles, not by those of so many threads, on which no rounding shall depend; and
  // at most a part for each panel of columns of a layer.
  const std::int64_t tiles = ceil_div(n, kernel_->block) * ceil_div(m, panel) *
                             ceil_div(plan.slices, plan.pairs) * (full ? plan.slices : 1);
  const auto numbers = static_cast<double>(n * plan.row_example);
  plan.parts =
      std::clamp(static_cast<std::int64_t>(multiplications / numbers / least_multiplications),
                 std::int64_t{1}, std::max(std::int64_t{1}, std::min(few_tiles / tiles, terms)));
  plan.layers = layers_.data();
  plan.n_layers = static_cast<std::int64_t>(layers_.size());

  advise_huge_pages(plan.out, static_cast<std::size_t>(n * plan.row_example) * sizeof(T));
  if (!place_groups(size)) return no_memory;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    PackedLayer<T>& layer = layers_[i];
    Census census[2];
    for (const bool is_left : {true, false}) {
      if (!is_left && symmetric) break;
      const Packer<T> packer{*kernel_, plan, is_left ? n : m, k, trace, is_left ? left_ : right_};
      parallel_for(threads, packer.tasks(layer), [&](std::int64_t task) {
        packer.run(layer, is_left ? layers[i].left : layers[i].right, task,
                   census[is_left ? 0 : 1]);
      });
    }
    // Of zeros times inf or nan, which are nan, none may be left out.
    const Census& other = census[symmetric ? 0 : 1];
    const bool finite = census[0].finite && other.finite;
    layer.skips_zeros = plan.slice > 1 && !layer.constant && finite &&
                        skipping_pays(census[0], other, plan, *kernel_);
    if (!finite && layer.row_offsets)
      for (std::size_t group = 0; group < left_.size(); ++group)
        Packer<T>{*kernel_, plan, n, k, trace, left_}.mark_all(layer,
                                                               static_cast<std::int64_t>(group));
  }
  std::stable_partition(layers_.begin(), layers_.end(),
                        [](const PackedLayer<T>& layer) { return layer.constant; });
  return {};
}

template <class T>
T* PackedGram<T>::room(std::int64_t size) {
  memory_.push_back(allocate_scratch<T>(size));
  return memory_.back().get();
}

// Late rows of a full kernel are not written before all else is done, and then in part copied from
// what is above the diagonal: the packed groups of the other rows need no memory besides. The fewer
// late rows, the less is read again to be mirrored.
template <class T>
bool PackedGram<T>::place_groups(std::int64_t size) {
  const std::int64_t panel = kernel_->panel, n = ceil_div(plan_.n, panel);
  constexpr auto line = static_cast<std::int64_t>(scratch_alignment / sizeof(T));
  late_ = n;
  if (plan_.symmetric && outputs_ == GramOutputs::full && plan_.parts == 1)
    for (std::int64_t late = n - 1; late_ == n && late >= ceil_div(n, 2); --late)
      if (late * size + line <= (plan_.n - late * panel) * plan_.row_example) late_ = late;
  const std::int64_t held = late_ < n ? late_ : 0;
  T* begin = plan_.out + held * panel * plan_.row_example;
  begin += line - 1 - (reinterpret_cast<std::uintptr_t>(begin) / sizeof(T) + line - 1) % line;
  const auto place = [&](std::vector<T*>& groups, std::int64_t count, std::int64_t first) {
    T* own = room((count - first) * size);
    for (std::int64_t i = 0; own && i < count; ++i)
      groups.push_back(i < first ? begin + i * size : own + (i - first) * size);
    return own != nullptr;
  };
  if (!place(left_, n, held)) return false;
  if (!plan_.symmetric && !place(right_, ceil_div(plan_.m, panel), 0)) return false;
  plan_.left = left_.data();
  plan_.right = plan_.symmetric ? plan_.left : right_.data();
  return true;
}

template <class T>
Status PackedGram<T>::run(int threads) {
  if (!kernel_) return {};
  const std::int64_t each = ceil_div(kernel_->scratch(plan_), 64) * 64;
  T* scratch = room(each * threads);
  if (!scratch) return no_memory;
  if (plan_.streams)
    populate(plan_.out, static_cast<std::size_t>(plan_.n * plan_.row_example) * sizeof(T), threads);
  for (const bool are_late : {false, true})
    if (const Status status = run_tiles(threads, are_late, scratch, each); !status.ok())
      return status;
  // The rest of the late rows, from the late columns.
  constexpr std::int64_t strip = 64;
  const std::int64_t size = plan_.n * plan_.width, late = late_ * kernel_->panel * plan_.width;
  parallel_for(threads, late < size ? ceil_div(late, strip) : 0, [&](std::int64_t task) {
    const std::int64_t row = task * strip, rows = std::min(strip, late - row);
    for (std::int64_t column = late; column < size; column += strip)
      kernel_->transpose(plan_.out + row * size + column, size, rows,
                         std::min(strip, size - column), plan_.out + column * size + row, size);
  });
  return {};
}

// Where there are few tiles, threads share the terms of their sums as well: each part of these has
// a result of its own, and the parts' results are added up in their order.
template <class T>
Status PackedGram<T>::run_tiles(int threads, bool are_late, T* scratch, std::int64_t each) {
  const auto tiles = tiles_of(plan_, kernel_->panel, outputs_, late_, are_late);
  const auto count = static_cast<std::int64_t>(tiles.size());
  if (count == 0) return {};
  const std::int64_t parts = plan_.parts;
  const std::int64_t size = plan_.n * plan_.row_example;
  T* sums = room((parts - 1) * size);
  if (!sums) return no_memory;
  std::vector<GramPlan<T>> plans(static_cast<std::size_t>(parts), plan_);
  for (std::int64_t i = 0; i < parts; ++i) {
    GramPlan<T>& plan = plans[static_cast<std::size_t>(i)];
    plan.part = i;
    if (i > 0) plan.out = sums + (i - 1) * size;
  }
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t worker) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count * parts;)
      kernel_->tile(plans[static_cast<std::size_t>(i % parts)],
                    tiles[static_cast<std::size_t>(i / parts)], scratch + worker * each);
  });
  parallel_for(threads, parts > 1 ? plan_.n : 0, [&](std::int64_t row) {
    T* to = plan_.out + row * plan_.row_example;
    for (const T* from = to - plan_.out + sums; from < sums + (parts - 1) * size; from += size)
      for (std::int64_t i = 0; i < plan_.row_example; ++i) to[i] += from[i];
  });
  return {};
}

// Long rows in slices: a BLAS may add up the products of few long rows one after the other, from
// what it finds in `out` on, and terms that are small against that sum are rounded away.
template <class T>
Status add_row_products(bool symmetric, std::int64_t n, std::int64_t m, std::int64_t p,
                        const T* left, const T* right, T* out, int threads) {
  constexpr std::int64_t slice = 8192, block = 256;
  const Scratch<T> part = allocate_scratch<T>(p > slice ? std::min(block, n) * m : 0);
  if (!part) return no_memory;
  for (std::int64_t row = 0; row < n; row += block) {
    const std::int64_t rows = std::min(block, n - row), column = symmetric ? row : 0;
    const std::int64_t columns = m - column;
    T* to = out + row * m + column;
    const auto multiply = [&](std::int64_t first, std::int64_t width, T beta, T* c,
                              std::int64_t ldc) {
      return blas::gemm(false, true, rows, columns, width, T(1), left + row * p + first, p,
                        right + column * p + first, p, beta, c, ldc);
    };
    if (p <= slice) {
      if (const Status status = multiply(0, p, T(1), to, m); !status.ok()) return status;
      continue;
    }
    for (std::int64_t first = 0; first < p; first += slice) {
      const Status status = multiply(first, std::min(slice, p - first), T(0), part.get(), columns);
      if (!status.ok()) return status;
      parallel_for(threads, rows, [&](std::int64_t i) {
        for (std::int64_t j = 0; j < columns; ++j) to[i * m + j] += part[i * columns + j];
      });
    }
  }
  return {};
}

template Status add_row_products<float>(bool, std::int64_t, std::int64_t, std::int64_t,
                                        const float*, const float*, float*, int);
template Status add_row_products<double>(bool, std::int64_t, std::int64_t, std::int64_t,
                                         const double*, const double*, double*, int);
template class PackedGram<float>;
template class PackedGram<double>;

}  // namespace jacpot
