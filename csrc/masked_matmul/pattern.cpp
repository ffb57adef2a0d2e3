#include "masked_matmul/pattern.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/parallel.hpp"

namespace jacpot::masked_matmul {
namespace {

constexpr std::int64_t magic = 0x31307470636a;  // "jcpt01"
constexpr std::int64_t alignment = 64;
constexpr std::int64_t lines_per_task = 64;

struct Header {
  std::int64_t magic, bytes, rows, columns, nnz;
  std::int64_t row_offsets, column_indices, column_offsets, row_indices, permutation, row_grid,
      column_grid;  // bytes from the start
};

int bytes_for_index(std::int64_t length) { return length <= 65536 ? 2 : 4; }

std::int64_t tasks_for(std::int64_t lines) { return (lines + lines_per_task - 1) / lines_per_task; }

// Indices that hold about `entries_per_step` entries of a line.
std::int64_t step_of(std::int64_t lines, std::int64_t length, std::int64_t nnz) {
  if (nnz == 0) return std::max<std::int64_t>(length, 1);
  const double wanted = static_cast<double>(entries_per_step) * static_cast<double>(lines) *
                        static_cast<double>(length) / static_cast<double>(nnz);
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(wanted), 16,
                                  std::max<std::int64_t>(length, 16));
}

std::int64_t steps_of(std::int64_t length, std::int64_t step) {
  return std::max<std::int64_t>(1, (length + step - 1) / step);
}

Header lay_out(std::int64_t rows, std::int64_t columns, std::int64_t nnz) {
  std::int64_t end = sizeof(Header);
  const auto place = [&end](std::int64_t bytes) {
    const std::int64_t at = (end + alignment - 1) / alignment * alignment;
    end = at + bytes;
    return at;
  };
  Header h{};
  h.magic = magic;
  h.rows = rows;
  h.columns = columns;
  h.nnz = nnz;
  h.row_offsets = place((rows + 1) * 4);
  h.column_indices = place(nnz * bytes_for_index(columns));
  h.column_offsets = place((columns + 1) * 4);
  h.row_indices = place(nnz * bytes_for_index(rows));
  h.permutation = place(nnz * 4);
  h.row_grid = place((steps_of(columns, step_of(rows, columns, nnz)) + 1) * rows * 4);
  h.column_grid = place((steps_of(rows, step_of(columns, rows, nnz)) + 1) * columns * 4);
  h.bytes = end;
  return h;
}

template <class T>
T* at(void* block, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(block) + offset);
}

// Calls f with pointers of the right width to the column indices and the row indices.
template <class F>
void with_indices(const Header& h, void* block, F&& f) {
  const bool narrow_columns = bytes_for_index(h.columns) == 2,
             narrow_rows = bytes_for_index(h.rows) == 2;
  const auto with_rows = [&](auto* columns) {
    if (narrow_rows)
      f(columns, at<std::uint16_t>(block, h.row_indices));
    else
      f(columns, at<std::int32_t>(block, h.row_indices));
  };
  if (narrow_columns)
    with_rows(at<std::uint16_t>(block, h.column_indices));
  else
    with_rows(at<std::int32_t>(block, h.column_indices));
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

// Visits, row by row, the entries whose columns lie in one task's range: f(entry, row, column).
template <class Index, class F>
void visit_columns(const Header& h, const std::int32_t* offsets, const Index* indices,
                   std::int64_t task, F&& f) {
  const std::int64_t first = task * lines_per_task,
                     last = std::min(h.columns, first + lines_per_task);
  for (std::int64_t r = 0; r < h.rows; ++r) {
    const Index* end = indices + offsets[r + 1];
    const Index* entry = std::lower_bound(indices + offsets[r], end, first);
    for (; entry < end && static_cast<std::int64_t>(*entry) < last; ++entry)
      f(entry - indices, r, static_cast<std::int64_t>(*entry));
  }
}

template <class Column, class Row>
void fill_columns(const Header& h, void* block, const Column* column_indices, Row* row_indices,
                  int threads) {
  const auto* row_offsets = at<std::int32_t>(block, h.row_offsets);
  auto* column_offsets = at<std::int32_t>(block, h.column_offsets);
  auto* permutation = at<std::int32_t>(block, h.permutation);
  std::memset(column_offsets, 0, static_cast<std::size_t>(h.columns + 1) * 4);
  parallel_for(threads, tasks_for(h.columns), [&](std::int64_t task) {
    visit_columns(h, row_offsets, column_indices, task,
                  [&](std::int64_t, std::int64_t, std::int64_t c) { ++column_offsets[c + 1]; });
  });
  for (std::int64_t c = 0; c < h.columns; ++c) column_offsets[c + 1] += column_offsets[c];
  parallel_for(threads, tasks_for(h.columns), [&](std::int64_t task) {
    std::int32_t next[lines_per_task];
    const std::int64_t first = task * lines_per_task;
    std::copy(column_offsets + first, column_offsets + std::min(h.columns, first + lines_per_task),
              next);
    visit_columns(h, row_offsets, column_indices, task,
                  [&](std::int64_t entry, std::int64_t r, std::int64_t c) {
                    const std::int32_t to = next[c - first]++;
                    row_indices[to] = static_cast<Row>(r);
                    permutation[to] = static_cast<std::int32_t>(entry);
                  });
  });
}

template <class Index>
void fill_grid(std::int64_t lines, std::int64_t length, std::int64_t nnz,
               const std::int32_t* offsets, const Index* indices, std::int32_t* grid, int threads) {
  const std::int64_t step = step_of(lines, length, nnz), steps = steps_of(length, step);
  parallel_for(threads, tasks_for(lines), [&](std::int64_t task) {
    const std::int64_t end = std::min(lines, (task + 1) * lines_per_task);
    for (std::int64_t l = task * lines_per_task; l < end; ++l) {
      std::int32_t e = offsets[l];
      for (std::int64_t s = 0; s < steps; ++s) {
        while (e < offsets[l + 1] && static_cast<std::int64_t>(indices[e]) < s * step) ++e;
        grid[s * lines + l] = e;
      }
      grid[steps * lines + l] = offsets[l + 1];
    }
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
  std::memset(block, 0, static_cast<std::size_t>(h.row_offsets));
  std::memcpy(block, &h, sizeof(h));
  std::memcpy(at<std::int32_t>(block, h.row_offsets), offsets,
              static_cast<std::size_t>(rows + 1) * 4);
  with_indices(h, block, [&](auto* column_indices, auto* row_indices) {
    fill_rows(mask, offsets, column_indices, threads);
    fill_columns(h, block, column_indices, row_indices, threads);
    fill_grid(h.rows, h.columns, h.nnz, at<std::int32_t>(block, h.row_offsets), column_indices,
              at<std::int32_t>(block, h.row_grid), threads);
    fill_grid(h.columns, h.rows, h.nnz, at<std::int32_t>(block, h.column_offsets), row_indices,
              at<std::int32_t>(block, h.column_grid), threads);
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
  const auto lines = [&](std::int64_t count, std::int64_t length, std::int64_t offsets,
                         std::int64_t indices, std::int64_t grid) {
    const std::int64_t step = step_of(count, length, h.nnz);
    return Lines{.lines = count,
                 .length = length,
                 .nnz = h.nnz,
                 .index_bytes = bytes_for_index(length),
                 .offsets = section(offsets),
                 .indices = base + indices,
                 .permutation = nullptr,
                 .step = step,
                 .steps = steps_of(length, step),
                 .grid = section(grid)};
  };
  pattern->rows = lines(h.rows, h.columns, h.row_offsets, h.column_indices, h.row_grid);
  pattern->columns = lines(h.columns, h.rows, h.column_offsets, h.row_indices, h.column_grid);
  pattern->columns.permutation = section(h.permutation);
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
                     std::memset(row, 0, static_cast<std::size_t>(width) * sizeof(Element));
                     for (std::int64_t k = 0; k < count; ++k) row[columns[k]] = in[k];
                   });
  });
}

}  // namespace jacpot::masked_matmul
