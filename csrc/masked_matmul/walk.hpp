// The walk that every sparse product takes over a batch: panels, tiles, and who does what. How
// panels are read and written is the caller's, so that activations and images take the same way.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "masked_matmul/kernels.hpp"

namespace jacpot::masked_matmul {

inline constexpr Status no_memory{Code::out_of_memory, "no memory for the panels"};

// As many threads as have something to do: waking one costs some 10 us.
inline int team(int threads, std::int64_t nnz, std::int64_t examples) {
  constexpr std::int64_t products_per_thread = 1 << 17;
  const std::int64_t useful = nnz * examples / products_per_thread + 1;
  return static_cast<int>(std::min<std::int64_t>(threads, useful));
}

// Lines [first(c), first(c + 1)) hold a like number of entries for every chunk c.
struct Chunks {
  const Lines& lines;
  std::int64_t count;
  std::int64_t unit = 1;  // of which every chunk begins at a multiple

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
    return chunk == count ? lines.lines : low / unit * unit;
  }
};

// A piece of scratch for each thread.
template <class T>
class WorkerScratch {
 public:
  WorkerScratch(int threads, std::int64_t size)
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

// Examples in panels: all of the widest shape but the last, which takes the narrowest that holds
// what is left.
template <class T>
class Panelling {
 public:
  Panelling(std::int64_t examples, int shapes) : examples_(examples), shapes_(shapes) {}
  std::int64_t width() const { return shape_for(examples_).width; }
  std::int64_t count() const { return ceil_div(examples_, width()); }
  std::int64_t example(std::int64_t panel) const { return panel * width(); }
  const Shape<T>& shape(std::int64_t panel) const { return shape_for(examples_ - example(panel)); }

 private:
  const Shape<T>& shape_for(std::int64_t examples) const {
    const Shape<T>* shapes = kernels_of<MaskedMatmulTable, T>().shapes;
    int i = 0;
    while (i + 1 < shapes_ && shapes[i].width < examples) ++i;
    return shapes[i];
  }
  std::int64_t examples_;
  int shapes_;
};

inline constexpr std::int64_t block_bytes = 512 << 10;  // of the lines that are walked in a tile

template <class T>
std::int64_t block_lines(std::int64_t width) {
  return std::max<std::int64_t>(16, block_bytes / (width * static_cast<std::int64_t>(sizeof(T))));
}

// The product of `lines` with every panel of the batch. `load(panel, first, last, to)` fetches
// features of a panel, `store(panel, first, last, from)` takes lines of the result.
template <class T, class Batch, class Load, class Store>
Status multiply(const Lines& lines, const T* values, const T* bias, bool relu, const Batch& panels,
                int threads, Load&& load, Store&& store) {
  if (panels.count() == 0 || lines.lines == 0) return {};
  // Chunks of lines only where panels alone don't share out well.
  Chunks chunks{lines, 1};
  while (panels.count() * chunks.count % threads != 0 &&
         panels.count() * chunks.count < 4 * threads)
    ++chunks.count;
  const std::int64_t tasks = panels.count() * chunks.count, block = block_lines<T>(panels.width());
  const auto workers = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  WorkerScratch<T> inputs(workers, lines.length * panels.width()),
      outputs(workers, std::min(block, lines.lines) * panels.width());
  if (!inputs.ok() || !outputs.ok()) return no_memory;
  parallel_workers(workers, tasks, [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t panel = task / chunks.count, chunk = task % chunks.count;
    const Shape<T>& shape = panels.shape(panel);
    T* input = inputs.get(worker);
    T* output = outputs.get(worker);
    load(panel, 0, lines.length, input);
    const std::int64_t end = chunks.first(chunk + 1);
    for (std::int64_t first = chunks.first(chunk); first < end; first += block) {
      const std::int64_t last = std::min(end, first + block);
      for (std::int64_t t = 0; t < lines.tiles; ++t)
        shape.multiply({lines, first, last, t}, values, input, output);
      if (bias || relu) shape.finish(first, last, bias, relu, output);
      store(panel, first, last, output);
    }
  });
  return {};
}

// Calls f(row-wise lines, values in their order): the rows as they are for narrow panels, whose
// time goes into reading the weight, and in tiles for wide ones.
template <class T, class F>
Status in_row_tiles(const Pattern& pattern, const T* values, std::int64_t width, int threads,
                    F&& f) {
  constexpr std::int64_t narrow_bytes = 64;
  const Lines& tiles = pattern.row_tiles;
  if (width * static_cast<std::int64_t>(sizeof(T)) <= narrow_bytes) return f(pattern.rows, values);
  if (tiles.tiles == 1) return f(tiles, values);
  const Scratch<T> packed = allocate_scratch<T>(tiles.nnz);
  if (!packed) return no_memory;
  // Runs are short: whole pieces are copied, whose ends the next run overwrites.
  constexpr std::int64_t runs_per_task = 1024, piece = 8;
  const std::int64_t runs = tiles.tiles * tiles.lines;
  parallel_for(threads, ceil_div(runs, runs_per_task), [&](std::int64_t task) {
    const std::int64_t end = std::min(runs, (task + 1) * runs_per_task),
                       stop = tiles.starts[end] - piece;
    for (std::int64_t r = task * runs_per_task; r < end; ++r) {
      const std::int64_t count = tiles.starts[r + 1] - tiles.starts[r];
      const T* from = values + pattern.run_places[r];
      T* to = packed.get() + tiles.starts[r];
      if (tiles.starts[r + 1] <= stop && pattern.run_places[r] + count <= tiles.nnz - piece)
        for (std::int64_t k = 0; k < count; k += piece)
          std::memcpy(to + k, from + k, piece * sizeof(T));
      else
        std::copy_n(from, count, to);
    }
  });
  return f(tiles, packed.get());
}

// Gradients by columns: of the values, in the order of the lines, where `gradient` is not null, and
// dx where `by_column`, the values in that order, is not null. A thread owns columns and takes the
// panels in turn, so nothing is shared between threads, and sums have one order whatever their
// number. Columns are shared out in multiples of `unit`.
template <class T, class Batch, class LoadX, class LoadDy, class StoreDx>
Status walk_columns(const Lines& lines, const T* by_column, T* gradient, const Batch& panels,
                    std::int64_t unit, int threads, LoadX&& load_x, LoadDy&& load_dy,
                    StoreDx&& store_dx) {
  if (panels.count() == 0 || lines.lines == 0) return {};
  // Every thread walks all panels of dy: they are packed once, and in groups that the last level
  // of cache holds.
  constexpr std::int64_t group_bytes = 4 << 20;
  const std::int64_t panel_size = lines.length * panels.width();
  const std::int64_t group = std::max<std::int64_t>(
      threads, group_bytes / (panel_size * static_cast<std::int64_t>(sizeof(T)) + 1));
  Scratch<T> packed = allocate_scratch<T>(std::min(group, panels.count()) * panel_size);
  const Chunks chunks{lines, std::min(lines.lines, threads * ceil_div(lines.lines, 512 * threads)),
                      unit};
  const auto workers = static_cast<int>(std::min<std::int64_t>(threads, chunks.count));
  const std::int64_t block = block_lines<T>(panels.width());
  WorkerScratch<T> inputs(workers, std::min(block, lines.lines) * panels.width()),
      outputs(workers, std::min(block, lines.lines) * panels.width());
  if (!packed || !inputs.ok() || !outputs.ok()) return no_memory;
  for (std::int64_t start = 0; start < panels.count(); start += group) {
    const std::int64_t stop = std::min(panels.count(), start + group);
    parallel_for(threads, stop - start, [&](std::int64_t p) {
      load_dy(start + p, 0, lines.length, packed.get() + p * panel_size);
    });
    parallel_workers(workers, chunks.count, [&](std::int64_t chunk, std::int64_t worker) {
      T* input = inputs.get(worker);
      T* output = outputs.get(worker);
      const std::int64_t end = chunks.first(chunk + 1);
      for (std::int64_t first = chunks.first(chunk); first < end; first += block) {
        const std::int64_t last = std::min(end, first + block);
        for (std::int64_t p = start; p < stop; ++p) {
          const Shape<T>& shape = panels.shape(p);
          const T* panel = packed.get() + (p - start) * panel_size;
          if (gradient) load_x(p, first, last, input);
          for (std::int64_t t = 0; t < lines.tiles; ++t) {
            const Tile tile{lines, first, last, t};
            if (by_column && gradient)
              shape.fused(tile, by_column, panel, input, output, gradient);
            else if (by_column)
              shape.multiply(tile, by_column, panel, output);
            else
              shape.sample(tile, panel, input, gradient);
          }
          if (by_column) store_dx(p, first, last, output);
        }
      }
    });
  }
  return {};
}

// Runs body(values or null, gradient or null), both in the order of the columns' tiles, between the
// permutations into and out of it. A tile's entries lie in few rows, side by side: its cache lines
// are used up before the walk goes on.
template <class T, class F>
Status in_column_order(const Pattern& pattern, const T* values, bool wants_dx, T* d_values,
                       int threads, F&& body) {
  const std::int64_t nnz = pattern.column_tiles.nnz;
  const auto for_each_entry = [&](auto&& f) {
    constexpr std::int64_t entries_per_task = 1 << 14;
    parallel_for(threads, ceil_div(nnz, entries_per_task), [&](std::int64_t task) {
      const std::int64_t end = std::min(nnz, (task + 1) * entries_per_task);
      for (std::int64_t e = task * entries_per_task; e < end; ++e) f(e, pattern.places[e]);
    });
  };
  Scratch<T> by_column, gradient;
  if (wants_dx) {
    if (!(by_column = allocate_scratch<T>(nnz))) return no_memory;
    for_each_entry([values, to = by_column.get()](std::int64_t e, std::int64_t place) {
      to[e] = values[place];
    });
  }
  if (d_values) {
    if (!(gradient = allocate_scratch<T>(nnz))) return no_memory;
    std::memset(gradient.get(), 0, static_cast<std::size_t>(nnz) * sizeof(T));
  }
  const Status status = body(by_column.get(), gradient.get());
  if (status.ok() && d_values)
    for_each_entry([d_values, from = gradient.get()](std::int64_t e, std::int64_t place) {
      d_values[place] = from[e];
    });
  return status;
}

}  // namespace jacpot::masked_matmul
