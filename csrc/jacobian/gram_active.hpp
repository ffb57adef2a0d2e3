// Products of signals over the units that are not zero.
//
// A hidden unit with a ReLU that is off for an example has a signal of zero for all K outputs of
// this example: about half the columns of δ_n (K, O). So the K rows of one example (or position)
// are multiplied by themselves: what is not zero of them is gathered, with the indices, and these
// say which rows of the panel of columns it meets. The register tile has fewer rows than that of
// all units, of several examples: 5 x 3 vectors for K = 10, which loads 8 vectors for 15 products
// in place of 11 for 24. On a processor that loads and multiplies a vector per clock both are
// bound by the products alone.
#pragma once

#include "jacobian/gram_panels.hpp"

namespace jacpot::JACPOT_ISA {

template <class T>
struct ActiveSignals {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Line = typename Panels<T>::Line;
  static constexpr int width = Panels<T>::width, vectors = Panels<T>::vectors,
                       panel = Panels<T>::panel, block = Panels<T>::block;
  static constexpr std::int64_t segment = Panels<T>::segment;

  std::int64_t outputs;  // rows of a unit
  T* values;             // (block, segment, outputs), may be written a vector beyond its end

  static std::int64_t scratch(std::int64_t outputs) { return block * segment * outputs + width; }

  // The rows of one example at its active units before `end`, and how many these are. The rows may
  // lie in several panels; what they are gathered to may be overwritten beyond its end.
  std::int64_t gather(const PackedSignals<T>& s, std::int64_t row, const std::int32_t* units,
                      std::int64_t end, T* to) const {
    struct Run {
      const T* first;
      std::int64_t at, size;
    } runs[gram_max_slice];
    int n_runs = 0;
    for (std::int64_t k = 0; k < outputs; k += runs[n_runs++].size) {
      const std::int64_t in_panel = panel - (row + k) % panel;
      runs[n_runs] = {s.row(row + k), k, min(min(width, in_panel), outputs - k)};
    }
    std::int64_t count = 0;
    for (; units[count] < end; ++count, to += outputs)
      for (int i = 0; i < n_runs; ++i)
        V::store(to + runs[i].at,
                 V::load_first(runs[i].first + std::int64_t{units[count]} * panel, runs[i].size));
    return count;
  }

  template <int R>
  void add_rows(const T* left, const std::int32_t* units, std::int64_t count, const T* right,
                const T* a, const Line* line, T* out) const {
    RegisterTile<T, R, vectors> sums;
    sums.add(left, outputs, right, panel, units, count);
    Panels<T>::multiply_into(out, a, line, R, sums);
  }

  // Σ over the signals' inner index, times the activations' products in a. Of each unit of the
  // group there is a list of `list_size`.
  void add(const PackedSignals<T>& s, const std::int32_t* lists, std::int64_t list_size,
           const GramPlace<T>& p, const T* a, const Line* line) const {
    const std::int64_t parts = (outputs + block - 1) / block;
    const std::int32_t* units[block];
    std::int64_t counts[block] = {};
    for (std::int64_t r = 0; r < p.count; ++r) units[r] = lists + (p.unit + r) * list_size;
    for (std::int64_t x = 0; x < s.inner; x += segment) {
      for (std::int64_t r = 0; r < p.count; ++r) {
        units[r] += counts[r];
        counts[r] = gather(s, (p.unit + r) * outputs, units[r], min(x + segment, s.inner),
                           values + r * segment * outputs);
      }
      for (std::int64_t q = p.skip; q < p.panels; ++q)
        for (std::int64_t r = 0; r < p.count; ++r)
          for (std::int64_t part = 0; part < parts; ++part) {
            const std::int64_t k = part * outputs / parts, end = (part + 1) * outputs / parts;
            with_count<block>(end - k, [&](auto rows) {
              add_rows<rows.value>(values + r * segment * outputs + k, units[r], counts[r],
                                   s.right + q * s.inner * panel, a + q * panel,
                                   line + r * outputs + k, p.out + q * panel);
            });
          }
    }
  }
};

}  // namespace jacpot::JACPOT_ISA
