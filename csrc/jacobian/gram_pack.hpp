// Copies factors into the groups of panels that the Gram kernels read; gram.hpp says what these
// are.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/parallel.hpp"
#include "jacobian/gram.hpp"

namespace jacpot {

// What packing finds out about the signals of a layer.
struct Census {
  std::atomic<std::int64_t> active{0}, all{0};  // units, of all rows and slices
  std::atomic<bool> finite{true};
};

// Of the factors of one side, in tasks small enough that all threads have some of a single group.
template <class T>
struct Packer {
  const GramKernels<T>& kernel;
  const GramPlan<T>& plan;
  std::int64_t examples, k;
  bool trace;
  const std::vector<T*>& groups;

  // Of each group: panels of activations, panels of each slice of signals, and bits of each slice.
  std::int64_t tasks(const PackedLayer<T>& layer) const {
    const std::int64_t slices = layer.constant ? 0 : plan.slices, marks = plan.slice > 1 ? 1 : 0;
    return (layer.positions + slices * (layer.positions * plan.slice + marks)) *
           static_cast<std::int64_t>(groups.size());
  }

  void run(const PackedLayer<T>& layer, const GramFactors<T>& side, std::int64_t task,
           Census& census) const {
    const auto count = static_cast<std::int64_t>(groups.size());
    const std::int64_t group = task % count, part = task / count, signals = part - layer.positions,
                       panels = layer.positions * plan.slice,  // of signals in a slice
        marks = signals - plan.slices * panels;
    if (signals < 0)
      pack_activations(layer, side, group, part);
    else if (marks < 0)
      pack_signals(layer, side, group, signals / panels, signals % panels);
    else
      mark_units(layer, side, group, marks, census);
  }

  // As if all units were active.
  void mark_all(const PackedLayer<T>& layer, std::int64_t group) const {
    for (std::int64_t slice = 0; slice < plan.slices; ++slice)
      for (std::int64_t unit = 0; unit < kernel.panel * layer.positions; ++unit)
        for (std::int64_t x = 0; x < layer.inner; x += 64)
          bits(layer, group, slice, unit)[x / 64] =
              ~std::uint64_t{0} >> (64 - std::min(layer.inner - x, std::int64_t{64}));
  }

 private:
  static constexpr std::int64_t most_rows = 64;  // of a panel, or outputs of a slice

  T* at(std::int64_t group, std::int64_t offset) const {
    return groups[static_cast<std::size_t>(group)] + offset;
  }
  std::uint64_t* bits(const PackedLayer<T>& layer, std::int64_t group, std::int64_t slice,
                      std::int64_t unit) const {
    return reinterpret_cast<std::uint64_t*>(at(group, layer.active)) +
           (slice * kernel.panel * layer.positions + unit) * layer.words;
  }
  // Rows (example, position) of a group.
  std::int64_t units_of(const PackedLayer<T>& layer, std::int64_t group) const {
    return std::min(kernel.panel, examples - group * kernel.panel) * layer.positions;
  }
  std::int64_t outputs_of(std::int64_t slice) const {
    return trace ? 1 : std::min(plan.slice, k - slice * plan.slice);
  }

  static const T* activations_of(const GramFactors<T>& side, std::int64_t example,
                                 std::int64_t position) {
    return side.activations + example * side.activations_example +
           position * side.activations_position;
  }
  static const T* signals_of(const GramFactors<T>& side, std::int64_t example,
                             std::int64_t position, std::int64_t output) {
    return side.signals + example * side.signals_example + position * side.signals_position +
           output * side.signals_output;
  }

  void pack_activations(const PackedLayer<T>& layer, const GramFactors<T>& side, std::int64_t group,
                        std::int64_t index) const {
    const std::int64_t panel = kernel.panel, first = index * panel, units = units_of(layer, group);
    if (first >= units) return;
    const T* rows[most_rows] = {};
    for (std::int64_t j = 0; j < std::min(panel, units - first); ++j)
      rows[j] = activations_of(side, group * panel + (first + j) / layer.positions,
                               (first + j) % layer.positions);
    kernel.pack(rows, layer.inputs, at(group, layer.activations) + first * layer.inputs, panel);
  }

  void pack_signals(const PackedLayer<T>& layer, const GramFactors<T>& side, std::int64_t group,
                    std::int64_t slice, std::int64_t index) const {
    const std::int64_t panel = kernel.panel, first = index * panel, outputs = outputs_of(slice),
                       used = units_of(layer, group) * outputs;
    if (first >= used) return;
    const T* rows[most_rows] = {};
    for (std::int64_t j = 0; j < std::min(panel, used - first); ++j) {
      const std::int64_t unit = (first + j) / outputs;
      rows[j] = signals_of(side, group * panel + unit / layer.positions, unit % layer.positions,
                           slice * plan.slice + (first + j) % outputs);
    }
    T* to = at(group, layer.signals + slice * layer.signals_slice) + first * layer.inner;
    if (!trace) return kernel.pack(rows, layer.inner, to, panel);
    for (std::int64_t j = 0; j < k; ++j) {  // inner index (o, k): units of a mask lie together
      kernel.pack(rows, layer.outputs, to + j * panel, k * panel);
      for (const T*& row : rows)
        if (row) row += side.signals_output;
    }
  }

  void mark_units(const PackedLayer<T>& layer, const GramFactors<T>& side, std::int64_t group,
                  std::int64_t slice, Census& census) const {
    const std::int64_t units = units_of(layer, group), outputs = outputs_of(slice);
    std::int64_t active = 0;
    bool finite = true;
    const T* rows[most_rows];
    for (std::int64_t unit = 0; unit < units; ++unit) {
      for (std::int64_t j = 0; j < outputs; ++j)
        rows[j] = signals_of(side, group * kernel.panel + unit / layer.positions,
                             unit % layer.positions, slice * plan.slice + j);
      active +=
          kernel.mark_active(rows, outputs, layer.inner, bits(layer, group, slice, unit), &finite);
    }
    census.active += active;
    census.all += units * layer.inner;
    if (!finite) census.finite = false;
  }
};

}  // namespace jacpot
