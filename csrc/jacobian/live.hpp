// J·v and Jᵀ·u of a layer whose signals are zero at many of its units, for all outputs of an
// example at once: those behind a ReLU that is off, or that a pool passes over.
//
// There neither signals are kept nor products of activations computed: of
//
//   (J v)[n,k] = Σ_t ⟨δ_nkt, V a_nt⟩        Jᵀu = Σ_n Σ_t (Σ_k u_nk δ_nkt) a_ntᵀ
//
// V a is wanted at the live units alone, and Σ_k u_k δ_k has nothing elsewhere. Both are sums over
// lists that belong to the examples, at which no BLAS helps: what they read lies in panels that
// stay in the first cache, where a product is one load. Under a mask V a is sparse, and is computed
// for all units: what is saved then is the reading of signals.
#pragma once

#include <cstdint>
#include <optional>

#include "common/scratch.hpp"
#include "common/status.hpp"
#include "common/view.hpp"
#include "jacobian/live_kernels.hpp"

namespace jacpot {

template <class T>
class LiveLayer {
 public:
  static constexpr std::int64_t block = live_block;

  std::int64_t n, k, positions, groups, outputs, inputs;
  const T* activations;             // (N, T, G, I), contiguous; not owned
  const std::int64_t* row_offsets;  // kept weights of the G·O rows, or null for all; not owned
  const std::int32_t* columns;
  bool bias;

  // Gives nothing where more than `most` of all units are live. Signals are (N, K, T, G, O).
  // A row is what the layer sees at one position of one example.
  static Status make(View<const T, 5> signals, const T* activations, std::int64_t inputs,
                     const std::int64_t* row_offsets, const std::int32_t* columns, bool bias,
                     double most, int threads, std::optional<LiveLayer>& out);

  std::int64_t rows() const { return n * positions; }
  std::int64_t units() const { return groups * outputs; }
  std::int64_t weights() const { return row_offsets ? row_offsets[units()] : units() * inputs; }
  std::int64_t parameters() const { return weights() + (bias ? units() : 0); }
  std::int64_t row_blocks() const { return (rows() + block - 1) / block; }
  std::int64_t unit_blocks() const { return (outputs + block - 1) / block; }  // of a group
  std::int64_t size() const { return starts_[rows()]; }  // live units of all rows
  std::int64_t bytes() const;

  // Where the live units of each row begin among all, (N·T + 1).
  const std::int64_t* starts() const { return starts_.get(); }
  // δ at the live units of an example's rows, (K, live), at K · starts()[its first row].
  const T* signals() const { return signals_.get(); }
  // The live units of each row in a block of a group's, as places in the block.
  const std::int64_t* row_begins(std::int64_t group, std::int64_t unit_block) const {
    return row_begins_.get() + (group * unit_blocks() + unit_block) * rows();
  }
  const std::uint8_t* units_of_rows() const { return row_entries_.get(); }
  // The rows of a block in which each of the G·O units is live, a bit for each.
  const std::uint64_t* rows_of_units(std::int64_t row_block) const {
    return rows_of_units_.get() + row_block * units();
  }

 private:
  LiveLayer() = default;
  void count(const View<const T, 5>& signals, std::int64_t row_block, std::uint8_t* live);
  void fill(const View<const T, 5>& signals, std::int64_t row_block, const std::uint8_t* live);

  Scratch<std::int64_t> starts_, row_begins_;
  Scratch<std::uint8_t> row_entries_;
  Scratch<std::uint64_t> rows_of_units_;
  Scratch<T> signals_;
};

// out (N, K, R) += J · vᵀ for v (R, P).
template <class T>
Status jvp(const LiveLayer<T>& layer, const T* v, std::int64_t r, T* out, int threads);

// out (R, P) = uᵀ · J for u (N, K, R).
template <class T>
Status vjp(const LiveLayer<T>& layer, const T* u, std::int64_t r, T* out, int threads);

}  // namespace jacpot
