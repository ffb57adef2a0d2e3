#include "jacobian/gram.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/blas.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "jacobian/huge_pages.hpp"

namespace jacpot {
namespace {

constexpr Status no_memory{Code::out_of_memory, "not enough memory for the packed factors"};
constexpr std::int64_t tile_bytes = 160 << 10;

const GramKernels<float>& kernels(const float*) {
  return active_table(static_cast<const GramTable*>(nullptr)).f32;
}
const GramKernels<double>& kernels(const double*) {
  return active_table(static_cast<const GramTable*>(nullptr)).f64;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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

template <class T>
class Packer {
 public:
  Packer(const GramKernels<T>& kernels, std::int64_t examples, std::int64_t k, std::int64_t slices,
         std::int64_t slice, bool trace)
      : kernels_(kernels),
        examples_(examples),
        k_(k),
        slices_(slices),
        slice_(slice),
        trace_(trace),
        groups_(ceil_div(examples, kernels.panel)) {}

  std::int64_t activations_size(const GramLayer<T>& layer) const {
    return groups_ * layer.positions * layer.inputs * kernels_.panel;
  }
  std::int64_t signals_size(const GramLayer<T>& layer) const {
    return slices_ * groups_ * layer.positions * slice_ * inner(layer) * kernels_.panel;
  }
  std::int64_t inner(const GramLayer<T>& layer) const { return layer.outputs * (trace_ ? k_ : 1); }
  std::int64_t tasks(bool constant) const { return groups_ * (1 + (constant ? 0 : slices_)); }

  // One group's activations, or the signals of one slice of its outputs.
  void run(const GramLayer<T>& layer, const GramFactors<T>& side, T* activations, T* signals,
           std::int64_t task) const {
    const std::int64_t group = task % groups_, slice = task / groups_ - 1;
    const std::int64_t panel = kernels_.panel, first = group * panel;
    const std::int64_t units = std::min(panel, examples_ - first) * layer.positions;
    const std::int64_t outputs = slice < 0 || trace_ ? 1 : std::min(slice_, k_ - slice * slice_);
    const std::int64_t width = slice < 0 ? layer.inputs : inner(layer);
    const std::int64_t panels = layer.positions * (slice < 0 ? 1 : slice_);
    T* dst = (slice < 0 ? activations : signals) +
             ((slice < 0 ? 0 : slice * groups_) + group) * panels * width * panel;
    const T* rows[64];
    for (std::int64_t start = 0; start < units * outputs; start += panel, dst += width * panel) {
      for (std::int64_t j = 0; j < panel; ++j) {
        const std::int64_t row = start + j, unit = row / outputs, output = row % outputs;
        const std::int64_t example = first + unit / layer.positions,
                           position = unit % layer.positions;
        if (unit >= units)
          rows[j] = nullptr;
        else if (slice < 0)
          rows[j] = side.activations + example * side.activations_example +
                    position * side.activations_position;
        else
          rows[j] = side.signals + example * side.signals_example +
                    (slice * slice_ + output) * side.signals_output +
                    position * side.signals_position;
      }
      if (slice < 0 || !trace_) {
        kernels_.pack(rows, width, dst, panel);
        continue;
      }
      for (std::int64_t j = 0; j < k_; ++j) {  // inner index (o, k): units of a mask lie together
        kernels_.pack(rows, layer.outputs, dst + j * panel, k_ * panel);
        for (std::int64_t r = 0; r < panel; ++r)
          if (rows[r]) rows[r] += side.signals_output;
      }
    }
  }

 private:
  const GramKernels<T>& kernels_;
  std::int64_t examples_, k_, slices_, slice_;
  bool trace_;
  std::int64_t groups_;
};

template <class T>
std::vector<GramTile> tiles_of(const GramPlan<T>& plan, std::int64_t panel, GramOutputs outputs) {
  std::vector<GramTile> tiles;
  const bool full = outputs == GramOutputs::full;
  for (std::int64_t j = 0; j < plan.right_groups; ++j)
    for (std::int64_t i = 0; i < (plan.symmetric ? j + 1 : plan.left_groups); ++i)
      for (std::int64_t first = 0; first < std::min(panel, plan.n - i * panel); first += plan.chunk)
        for (std::int64_t p = 0; p < plan.slices; p += plan.pairs)
          for (std::int64_t q = full ? 0 : p; q < (full ? plan.slices : p + 1); ++q)
            tiles.push_back({i, first, j, p, q, std::min(plan.pairs, plan.slices - p)});
  return tiles;
}

}  // namespace

template <class T>
Status gram(const std::vector<GramLayer<T>>& layers, bool symmetric, std::int64_t n, std::int64_t m,
            std::int64_t k, GramOutputs outputs, T* out, int threads) {
  if (n == 0 || m == 0 || k == 0) return {};
  const GramKernels<T>& kernel = kernels(static_cast<const T*>(nullptr));
  const std::int64_t panel = kernel.panel;
  const bool full = outputs == GramOutputs::full, trace = outputs == GramOutputs::trace;

  GramPlan<T> plan{};
  plan.symmetric = symmetric;
  plan.n = n;
  plan.m = m;
  plan.left_groups = ceil_div(n, panel);
  plan.right_groups = ceil_div(m, panel);
  plan.width = trace ? 1 : k;
  plan.slices = full ? ceil_div(k, gram_max_slice) : plan.width;
  plan.slice = full ? ceil_div(k, plan.slices) : 1;
  plan.slices = ceil_div(plan.width, plan.slice);
  plan.pairs = outputs == GramOutputs::diagonal ? std::min(plan.slices, gram_max_slice) : 1;
  const std::int64_t block_bytes = kernel.block * plan.slice * panel * plan.slice * plan.pairs *
                                   static_cast<std::int64_t>(sizeof(T));
  plan.chunk =
      std::clamp(tile_bytes / block_bytes, std::int64_t{1}, panel / kernel.block) * kernel.block;
  plan.row_example = full ? k * m * k : trace ? m : m * k;
  plan.row_output = full ? m * k : 1;
  plan.column_example = trace ? 1 : k;
  plan.column_output = full ? 1 : 0;
  plan.out = out;

  std::vector<PackedLayer<T>> packed_layers;
  std::vector<Scratch<T>> memory;
  auto room = [&](std::int64_t size) -> T* {
    memory.push_back(allocate_scratch<T>(size));
    return memory.back().get();
  };
  for (const GramLayer<T>& layer : layers) {
    const GramFactors<T>& right = symmetric ? layer.left : layer.right;
    const bool constant = layer.positions == 1 && !layer.row_offsets &&
                          is_constant(layer.left, n, k, layer.outputs) &&
                          (symmetric || is_constant(right, m, k, layer.outputs));
    PackedLayer<T> packed{};
    packed.positions = layer.positions;
    packed.inputs = layer.inputs;
    packed.outputs = layer.outputs;
    packed.row_offsets = layer.row_offsets;
    packed.columns = layer.columns;
    packed.bias = layer.bias;
    if (constant) {
      T* products = room(plan.width * plan.width);
      if (!products) return no_memory;
      constant_products(layer, right, k, trace, products);
      packed.constant = products;
    }
    for (const bool is_left : {true, false}) {
      if (!is_left && symmetric) break;
      const Packer<T> packer(kernel, is_left ? n : m, k, plan.slices, plan.slice, trace);
      packed.inner = packer.inner(layer);
      T* activations = room(packer.activations_size(layer));
      T* signals = room(constant ? 0 : packer.signals_size(layer));
      if (!activations || !signals) return no_memory;
      const GramFactors<T>& side = is_left ? layer.left : right;
      parallel_for(threads, packer.tasks(constant),
                   [&](std::int64_t task) { packer.run(layer, side, activations, signals, task); });
      (is_left ? packed.left : packed.right) = {activations, signals};
    }
    if (symmetric) packed.right = packed.left;
    packed_layers.push_back(packed);
  }
  plan.layers = packed_layers.data();
  plan.n_layers = static_cast<std::int64_t>(packed_layers.size());

  const std::vector<GramTile> tiles = tiles_of(plan, panel, outputs);
  const std::int64_t workers =
      std::min<std::int64_t>(threads, static_cast<std::int64_t>(tiles.size()));
  const std::int64_t each = ceil_div(kernel.scratch(plan), 64) * 64;
  T* scratch = room(each * workers);
  if (!scratch) return no_memory;
  advise_huge_pages(out, static_cast<std::size_t>(full    ? n * k * m * k
                                                  : trace ? n * m
                                                          : n * m * k) *
                             sizeof(T));
  std::atomic<std::size_t> next{0};
  parallel_for(threads, workers, [&](std::int64_t worker) {
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tiles.size();)
      kernel.tile(plan, tiles[i], scratch + worker * each);
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
template Status gram<float>(const std::vector<GramLayer<float>>&, bool, std::int64_t, std::int64_t,
                            std::int64_t, GramOutputs, float*, int);
template Status gram<double>(const std::vector<GramLayer<double>>&, bool, std::int64_t,
                             std::int64_t, std::int64_t, GramOutputs, double*, int);

}  // namespace jacpot
