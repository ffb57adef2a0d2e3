#include "masked_matmul/pattern.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/parallel.hpp"

namespace jacpot::masked_matmul {
namespace {

constexpr std::int64_t magic = 0x32307470636a;  // "jcpt02"
constexpr std::int64_t alignment = 64;
constexpr std::int64_t lines_per_task = 64;

struct Header {
  std::int64_t magic, bytes, rows, columns, nnz;
  // Bytes from the start.
  std::int64_t row_offsets, column_indices, column_offsets;
  std::int64_t row_starts, row_places, row_indices;           // of the tiles of rows
  std::int64_t column_starts, column_places, column_entries;  // of the tiles of columns
};

int bytes_for_index(std::int64_t span) { return span <= 65536 ? 2 : 4; }

std::int64_t tasks_for(std::int64_t lines) { return (lines + lines_per_task - 1) / lines_per_task; }

// How a length is cut. Measured: a run of about `entries` outweighs reading and writing the sums
// of its line, but no tile should be narrower than `least`, where a cache holds it anyway, or
// wider than `most`, where none does; half as many entries are better than a line each.
struct Cut {
  std::int64_t span = 1, tiles = 1;

  Cut(std::int64_t lines, std::int64_t length, std::int64_t nnz, double entries, double least) {
    constexpr double most = 1024, widest = 65536;
    const double per_index = static_cast<double>(nnz) / std::max(1.0, static_cast<double>(length)) /
                             std::max(1.0, static_cast<double>(lines));
    const double wanted = std::min(
        {widest, std::max(least, entries / per_index), std::max(most, entries / 2 / per_index)});
    tiles = std::max<std::int64_t>(
        1, static_cast<std::int64_t>(std::ceil(static_cast<double>(length) / wanted)));
    span = std::max<std::int64_t>(1, (length + tiles - 1) / tiles);
  }
};

Cut cut_rows(std::int64_t rows, std::int64_t columns, std::int64_t nnz) {
  return {rows, columns, nnz, 16, 128};
}
// The backward walk loads a vector for two products, not one: its tiles may be wider.
Cut cut_columns(std::int64_t rows, std::int64_t columns, std::int64_t nnz) {
  return {columns, rows, nnz, 32, 256};
}

Header lay_out(std::int64_t rows, std::int64_t columns, std::int64_t nnz) {
  std::int64_t end = sizeof(Header);
  const auto place = [&end](std::int64_t bytes) {
    const std::int64_t at = (end + alignment - 1) / alignment * alignment;
    end = at + bytes;
    return at;
  };
  const std::int64_t row_runs = cut_rows(rows, columns, nnz).tiles * rows,
                     column_runs = cut_columns(rows, columns, nnz).tiles * columns;
  Header h{};
  h.magic = magic;
  h.rows = rows;
  h.columns = columns;
  h.nnz = nnz;
  h.row_offsets = place((rows + 1) * 4);
  h.column_indices = place(nnz * bytes_for_index(columns));
  h.column_offsets = place((columns + 1) * 4);
  if (row_runs == rows) {  // a single tile is the order of the rows itself
    h.row_starts = h.row_places = h.row_offsets;
    h.row_indices = h.column_indices;
  } else {
    h.row_starts = place((row_runs + 1) * 4);
    h.row_places = place(row_runs * 4);
    h.row_indices = place(nnz * 2);
  }
  h.column_starts = place((column_runs + 1) * 4);
  h.column_places = place(nnz * 4);
  h.column_entries = place(nnz * 2);
  h.bytes = end;
  return h;
}

template <class T>
T* at(void* block, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(block) + offset);
}

// Calls f with a pointer of the right width to the column indices.
template <class F>
void with_indices(const Header& h, void* block, F&& f) {
  if (bytes_for_index(h.columns) == 2)
    f(at<std::uint16_t>(block, h.column_indices));
  else
    f(at<std::int32_t>(block, h.column_indices));
}

template <class Index>
void fill_rows(const View<const bool, 2>& mask, const std::int32_t* offsets, Index* column_indices,
               int threads) {
  const std::int64_t rows = mask.shape[0], columns = mask.shape[1];
  parallel_for(threads, tasks_for(rows), [&](std::int64_t task) {
    const std::int64_t end = std::min(rows, (task + 1) * lines_per_task);
    for (std::int64_t r = task * lines_per_task; r < end; ++r) {
      Index* out = column_indices + offsets[r];
      for (std::int64_t c = 0; c < columns; ++c)
        if (mask(r, c)) *out++ = static_cast<Index>(c);
    }
  });
}

// Turns the lengths of runs, from the second element on, into where they begin.
void accumulate(std::int32_t* starts, std::int64_t runs) {
  starts[0] = 0;
  for (std::int64_t r = 0; r < runs; ++r) starts[r + 1] += starts[r];
}

template <class Index>
void fill_row_tiles(const Header& h, void* block, const Index* column_indices, int threads) {
  const Cut cut = cut_rows(h.rows, h.columns, h.nnz);
  if (cut.tiles == 1) return;
  const auto* offsets = at<std::int32_t>(block, h.row_offsets);
  auto* starts = at<std::int32_t>(block, h.row_starts);
  auto* places = at<std::int32_t>(block, h.row_places);
  auto* indices = at<std::uint16_t>(block, h.row_indices);
  const auto for_each_run = [&](auto&& f) {  // f(tile, row, first entry, end) in row order
    parallel_for(threads, tasks_for(h.rows), [&](std::int64_t task) {
      const std::int64_t end = std::min(h.rows, (task + 1) * lines_per_task);
      for (std::int64_t r = task * lines_per_task; r < end; ++r) {
        const Index* entry = column_indices + offsets[r];
        const Index* last = column_indices + offsets[r + 1];
        for (std::int64_t t = 0; t < cut.tiles; ++t) {
          const Index* first = entry;
          while (entry < last && static_cast<std::int64_t>(*entry) < (t + 1) * cut.span) ++entry;
          f(t, r, first, entry);
        }
      }
    });
  };
  for_each_run([&](std::int64_t t, std::int64_t r, const Index* first, const Index* end) {
    starts[t * h.rows + r + 1] = static_cast<std::int32_t>(end - first);
    places[t * h.rows + r] = static_cast<std::int32_t>(first - column_indices);
  });
  accumulate(starts, cut.tiles * h.rows);
  for_each_run([&](std::int64_t t, std::int64_t r, const Index* first, const Index* end) {
    std::uint16_t* to = indices + starts[t * h.rows + r];
    for (; first < end; ++first)
      *to++ = static_cast<std::uint16_t>(static_cast<std::int64_t>(*first) - t * cut.span);
  });
}

template <class Index>
void fill_column_tiles(const Header& h, void* block, const Index* column_indices, int threads) {
  const Cut cut = cut_columns(h.rows, h.columns, h.nnz);
  const auto* row_offsets = at<std::int32_t>(block, h.row_offsets);
  auto* offsets = at<std::int32_t>(block, h.column_offsets);
  auto* starts = at<std::int32_t>(block, h.column_starts);
  auto* places = at<std::int32_t>(block, h.column_places);
  auto* indices = at<std::uint16_t>(block, h.column_entries);
  constexpr std::int64_t columns_per_task = 512;
  const std::int64_t parts = (h.columns + columns_per_task - 1) / columns_per_task;
  // A task owns some columns of a tile: f(its runs, entry, row in the tile, column in the task).
  const auto for_each_task = [&](auto&& prepare, auto&& f) {
    parallel_for(threads, cut.tiles * parts, [&](std::int64_t task) {
      const std::int64_t t = task / parts, first = task % parts * columns_per_task,
                         last = std::min(h.columns, first + columns_per_task);
      std::int32_t* runs = starts + t * h.columns + first;
      std::int32_t next[columns_per_task];
      prepare(runs, last - first, next);
      for (std::int64_t r = t * cut.span; r < std::min(h.rows, (t + 1) * cut.span); ++r) {
        const Index* end = column_indices + row_offsets[r + 1];
        const Index* entry = std::lower_bound(column_indices + row_offsets[r], end, first);
        for (; entry < end && static_cast<std::int64_t>(*entry) < last; ++entry)
          f(runs, next, static_cast<std::int32_t>(entry - column_indices), r - t * cut.span,
            static_cast<std::int64_t>(*entry) - first);
      }
    });
  };
  for_each_task(
      [](std::int32_t* runs, std::int64_t count, std::int32_t*) {
        std::memset(runs + 1, 0, static_cast<std::size_t>(count) * 4);
      },
      [](std::int32_t* runs, std::int32_t*, std::int32_t, std::int64_t, std::int64_t column) {
        ++runs[column + 1];
      });
  for (std::int64_t c = 0; c < h.columns; ++c) {
    std::int32_t count = 0;
    for (std::int64_t t = 0; t < cut.tiles; ++t) count += starts[t * h.columns + c + 1];
    offsets[c + 1] = count;
  }
  accumulate(offsets, h.columns);
  accumulate(starts, cut.tiles * h.columns);
  for_each_task([](std::int32_t* runs, std::int64_t count,
                   std::int32_t* next) { std::copy_n(runs, count, next); },
                [&](std::int32_t*, std::int32_t* next, std::int32_t entry, std::int64_t row,
                    std::int64_t column) {
                  const std::int32_t to = next[column]++;
                  indices[to] = static_cast<std::uint16_t>(row);
                  places[to] = entry;
                });
}

// Calls f(element of the values, row, column) for the entries of each row.
template <class Element, class F>
void for_each_entry(const Pattern& pattern, Element* values, int threads, F&& row_function) {
  const Lines& rows = pattern.rows;
  parallel_for(threads, tasks_for(rows.lines), [&](std::int64_t task) {
    const std::int64_t end = std::min(rows.lines, (task + 1) * lines_per_task);
    for (std::int64_t r = task * lines_per_task; r < end; ++r) {
      const std::int64_t count = rows.offsets[r + 1] - rows.offsets[r];
      if (rows.index_bytes == 2)
        row_function(r, static_cast<const std::uint16_t*>(rows.indices) + rows.offsets[r],
                     values + rows.offsets[r], count);
      else
        row_function(r, static_cast<const std::int32_t*>(rows.indices) + rows.offsets[r],
                     values + rows.offsets[r], count);
    }
  });
}

template <class F>
Status with_element(int bytes, F&& f) {
  switch (bytes) {
    case 2:
      f(std::uint16_t{});
      return {};
    case 4:
      f(std::uint32_t{});
      return {};
    case 8:
      f(std::uint64_t{});
      return {};
    default:
      return {Code::unsupported, "elements must have 2, 4 or 8 bytes"};
  }
}

}  // namespace

Status measure(const View<const bool, 2>& mask, std::int32_t* offsets, std::int64_t* bytes,
               int threads) {
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  const std::int64_t rows = mask.shape[0], columns = mask.shape[1];
  if (rows >= limit || columns >= limit)
    return {Code::overflow, "a pattern must have fewer than 2^31 - 1 rows and columns"};
  parallel_for(threads, tasks_for(rows), [&](std::int64_t task) {
    const std::int64_t end = std::min(rows, (task + 1) * lines_per_task);
    for (std::int64_t r = task * lines_per_task; r < end; ++r) {
      std::int32_t count = 0;
      if (mask.stride[1] == 1)  // a loop the compiler vectorises
        for (std::int64_t c = 0; c < columns; ++c) count += mask.data[r * mask.stride[0] + c];
      else
        for (std::int64_t c = 0; c < columns; ++c) count += mask(r, c);
      offsets[r + 1] = count;
    }
  });
  offsets[0] = 0;
  std::int64_t nnz = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    nnz += offsets[r + 1];
    if (nnz > limit) return {Code::overflow, "a pattern must keep fewer than 2^31 entries"};
    offsets[r + 1] = static_cast<std::int32_t>(nnz);
  }
  *bytes = lay_out(rows, columns, nnz).bytes;
  return {};
}

Status compile(const View<const bool, 2>& mask, const std::int32_t* offsets, void* block,
               std::int64_t bytes, int threads) {
  const std::int64_t rows = mask.shape[0];
  const Header h = lay_out(rows, mask.shape[1], offsets[rows]);
  if (h.bytes != bytes) return {Code::invalid_argument, "the block is not of the measured size"};
  // Gaps before sections are zero, so that equal masks give equal blocks, byte by byte.
  for (const std::int64_t section :
       {h.row_offsets, h.column_indices, h.column_offsets, h.row_starts, h.row_places,
        h.row_indices, h.column_starts, h.column_places, h.column_entries})
    std::memset(at<char>(block, section - alignment), 0, alignment);
  std::memset(block, 0, static_cast<std::size_t>(h.row_offsets));
  std::memcpy(block, &h, sizeof(h));
  std::memcpy(at<std::int32_t>(block, h.row_offsets), offsets,
              static_cast<std::size_t>(rows + 1) * 4);
  with_indices(h, block, [&](auto* column_indices) {
    fill_rows(mask, offsets, column_indices, threads);
    fill_row_tiles(h, block, column_indices, threads);
    fill_column_tiles(h, block, column_indices, threads);
  });
  return {};
}

Status open(const void* block, std::int64_t bytes, Pattern* pattern) {
  constexpr Status refused{Code::invalid_argument, "not a compiled pattern"};
  Header h;
  if (bytes < static_cast<std::int64_t>(sizeof(h))) return refused;
  std::memcpy(&h, block, sizeof(h));
  if (h.magic != magic || h.bytes != bytes || lay_out(h.rows, h.columns, h.nnz).bytes != bytes)
    return refused;
  const auto* base = static_cast<const char*>(block);
  const auto section = [base](std::int64_t offset) {
    return reinterpret_cast<const std::int32_t*>(base + offset);
  };
  const auto lines = [&](std::int64_t count, std::int64_t length, const Cut& cut,
                         std::int64_t offsets, std::int64_t starts, std::int64_t indices) {
    return Lines{.lines = count,
                 .length = length,
                 .nnz = h.nnz,
                 .span = cut.span,
                 .tiles = cut.tiles,
                 .index_bytes = bytes_for_index(cut.span),
                 .offsets = section(offsets),
                 .starts = section(starts),
                 .indices = base + indices};
  };
  const Cut rows = cut_rows(h.rows, h.columns, h.nnz),
            columns = cut_columns(h.rows, h.columns, h.nnz);
  Cut uncut = rows;
  uncut.tiles = 1;
  uncut.span = std::max<std::int64_t>(1, h.columns);
  pattern->rows = lines(h.rows, h.columns, uncut, h.row_offsets, h.row_offsets, h.column_indices);
  pattern->row_tiles = lines(h.rows, h.columns, rows, h.row_offsets, h.row_starts, h.row_indices);
  pattern->run_places = section(h.row_places);
  pattern->column_tiles =
      lines(h.columns, h.rows, columns, h.column_offsets, h.column_starts, h.column_entries);
  pattern->places = section(h.column_places);
  return {};
}

Status compress(const Pattern& pattern, int element_bytes, const void* weight,
                std::int64_t row_stride, std::int64_t column_stride, void* values, int threads) {
  return with_element(element_bytes, [&](auto element) {
    using Element = decltype(element);
    const auto* from = static_cast<const Element*>(weight);
    for_each_entry(pattern, static_cast<Element*>(values), threads,
                   [&](std::int64_t r, const auto* columns, Element* out, std::int64_t count) {
                     const Element* row = from + r * row_stride;
                     for (std::int64_t k = 0; k < count; ++k)
                       out[k] = row[columns[k] * column_stride];
                   });
  });
}

Status expand(const Pattern& pattern, int element_bytes, const void* values, void* weight,
              int threads) {
  return with_element(element_bytes, [&](auto element) {
    using Element = decltype(element);
    const std::int64_t width = pattern.rows.length;
    for_each_entry(pattern, static_cast<const Element*>(values), threads,
                   [&](std::int64_t r, const auto* columns, const Element* in, std::int64_t count) {
                     Element* row = static_cast<Element*>(weight) + r * width;
                     std::fill_n(row, width, Element{});
                     for (std::int64_t k = 0; k < count; ++k) row[columns[k]] = in[k];
                   });
  });
}

}  // namespace jacpot::masked_matmul
