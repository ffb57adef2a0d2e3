#include "masked_matmul/masked_matmul.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "masked_matmul/kernels.hpp"

namespace jacpot::masked_matmul {
namespace {

constexpr Status no_memory{Code::out_of_memory, "no memory for the panels"};

template <class T>
const Kernels<T>& kernels() {
  const KernelTable& table = active_table(static_cast<const KernelTable*>(nullptr));
  if constexpr (std::is_same_v<T, float>)
    return table.of_float;
  else
    return table.of_double;
}

// As many threads as have something to do: waking one costs some 10 us.
int team(int threads, std::int64_t nnz, std::int64_t examples) {
  constexpr std::int64_t products_per_thread = 1 << 17;
  const std::int64_t useful = nnz * examples / products_per_thread + 1;
  return static_cast<int>(std::min<std::int64_t>(threads, useful));
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Lines [first(c), first(c + 1)) hold a like number of entries for every chunk c.
struct Chunks {
  const Lines& lines;
  std::int64_t count;

  std::int64_t first(std::int64_t chunk) const {
    // A line costs something even when it is empty: count it as one more entry.
    const std::int64_t total = lines.nnz + lines.lines, goal = total * chunk / count;
    std::int64_t low = 0, high = lines.lines;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (lines.offsets[middle] + middle < goal)
        low = middle + 1;
      else
        high = middle;
    }
    return chunk == count ? lines.lines : low;
  }
};

// A piece of scratch for each thread.
template <class T>
class Panels {
 public:
  Panels(int threads, std::int64_t size)
      : size_(size), memory_(allocate_scratch<T>(size * threads)) {}
  bool ok() const { return memory_ != nullptr; }
  T* get(std::int64_t worker) const { return memory_.get() + worker * size_; }

 private:
  std::int64_t size_;
  Scratch<T> memory_;
};

// Runs body(task, worker) for every task: `worker` is below `threads` and no two tasks at a
// time share one, so it can name a piece of scratch.
template <class F>
void parallel_workers(int threads, std::int64_t tasks, F&& body) {
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, std::min<std::int64_t>(threads, tasks), [&](std::int64_t worker) {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(task, worker);
  });
}

// out (N, lines) = product of `lines` with in (N, length).
template <class T>
Status multiply(const Lines& lines, const T* values, const T* bias, bool relu,
                Activations<const T> in, Activations<T> out, int threads) {
  const Kernels<T>& k = kernels<T>();
  const std::int64_t panels = ceil_div(in.examples, k.width);
  if (panels == 0 || lines.lines == 0) return {};
  const Chunks chunks{lines,
                      std::clamp<std::int64_t>(ceil_div(2 * threads, panels), 1, lines.lines)};
  const std::int64_t tasks = panels * chunks.count;
  const auto workers = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  Panels<T> inputs(workers, lines.length * k.width), outputs(workers, lines.lines * k.width);
  if (!inputs.ok() || !outputs.ok()) return no_memory;
  parallel_workers(workers, tasks, [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t example = task / chunks.count * k.width;
    const std::int64_t first = chunks.first(task % chunks.count),
                       last = chunks.first(task % chunks.count + 1);
    T* input = inputs.get(worker);
    T* output = outputs.get(worker);
    k.pack(in, example, 0, lines.length, input);
    k.multiply(lines, values, first, last, input, output);
    if (bias || relu) k.finish(first, last, bias, relu, output);
    k.unpack(output, example, first, last, out);
  });
  return {};
}

template <class T>
void permute(const Lines& lines, const T* from, T* to, int threads) {
  constexpr std::int64_t grain = 8192;
  parallel_for(threads, ceil_div(lines.nnz, grain), [&](std::int64_t task) {
    const std::int64_t end = std::min(lines.nnz, (task + 1) * grain);
    for (std::int64_t e = task * grain; e < end; ++e) to[e] = from[lines.permutation[e]];
  });
}

template <class T>
void permute_back(const Lines& lines, const T* from, T* to, int threads) {
  constexpr std::int64_t grain = 8192;
  parallel_for(threads, ceil_div(lines.nnz, grain), [&](std::int64_t task) {
    const std::int64_t end = std::min(lines.nnz, (task + 1) * grain);
    for (std::int64_t e = task * grain; e < end; ++e) to[lines.permutation[e]] = from[e];
  });
}

}  // namespace

template <class T>
Status forward(const Pattern& pattern, const T* values, const T* bias, bool relu,
               Activations<const T> x, Activations<T> y, int threads) {
  threads = team(threads, pattern.rows.nnz, x.examples);
  return multiply(pattern.rows, values, bias, relu, x, y, threads);
}

template <class T>
Status backward(const Pattern& pattern, const T* values, Activations<const T> x,
                Activations<const T> dy, Activations<T> dx, T* d_values, int threads) {
  threads = team(threads, pattern.rows.nnz, dy.examples);
  const Kernels<T>& k = kernels<T>();
  const Lines& lines = pattern.columns;
  const bool wants_dx = dx.data != nullptr, wants_values = d_values != nullptr;
  Scratch<T> by_column, gradient;
  if (wants_dx) {
    if (!(by_column = allocate_scratch<T>(lines.nnz))) return no_memory;
    permute(lines, values, by_column.get(), threads);
  }
  if (!wants_values)
    return wants_dx ? multiply<T>(lines, by_column.get(), nullptr, false, dy, dx, threads)
                    : Status{};

  if (!(gradient = allocate_scratch<T>(lines.nnz))) return no_memory;
  std::memset(gradient.get(), 0, static_cast<std::size_t>(lines.nnz) * sizeof(T));
  const std::int64_t panels = ceil_div(dy.examples, k.width);
  // All panels of dy are packed first, since every thread walks all of them: a thread owns
  // columns, so nothing is shared and sums have one order whatever the number of threads.
  const std::int64_t panel_size = lines.length * k.width;
  Scratch<T> packed = allocate_scratch<T>(panels * panel_size);
  if (!packed) return no_memory;
  parallel_for(threads, panels, [&](std::int64_t p) {
    k.pack(dy, p * k.width, 0, lines.length, packed.get() + p * panel_size);
  });
  const Chunks chunks{
      lines, std::clamp<std::int64_t>(4 * threads, 1, std::max<std::int64_t>(lines.lines, 1))};
  const auto workers = static_cast<int>(std::min<std::int64_t>(threads, chunks.count));
  Panels<T> inputs(workers, lines.lines * k.width), outputs(workers, lines.lines * k.width);
  if (!inputs.ok() || !outputs.ok()) return no_memory;
  parallel_workers(workers, chunks.count, [&](std::int64_t chunk, std::int64_t worker) {
    const std::int64_t first = chunks.first(chunk), last = chunks.first(chunk + 1);
    T* input = inputs.get(worker);
    T* output = outputs.get(worker);
    for (std::int64_t p = 0; p < panels; ++p) {
      const T* panel = packed.get() + p * panel_size;
      k.pack(x, p * k.width, first, last, input);
      if (wants_dx) {
        k.fused(lines, by_column.get(), first, last, panel, input, output, gradient.get());
        k.unpack(output, p * k.width, first, last, dx);
      } else {
        k.sample(lines, first, last, panel, input, gradient.get());
      }
    }
  });
  permute_back(lines, gradient.get(), d_values, threads);
  return {};
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
