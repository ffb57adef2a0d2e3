// The fused Hadamard-Gram: inner products of the rows of Jacobians that are given as layer factors,
//
//   out[n,k,m,l] = Σ_layers Σ_t Σ_s ⟨a_nt, a_ms⟩ ⟨δ_nkt, δ_mls⟩,
//
// without the Jacobian and with the output written once. For a tile of rows (n,t) and columns (m,s)
// the activations' inner products are formed once and multiplied into those of the signals, which
// never leave the registers otherwise; all layers are added up in a tile that stays in cache.
//
// Under a mask the sum over the inputs i of one output unit o runs over kept ones only. The columns
// of one unit still factorise, so each unit is a layer of its own:
//   Σ_o (Σ_{i kept at o} a_ni a_mi) δ_nko δ_mlo,
// which costs N² (nnz + O K²) instead of N² K² nnz for generated columns.
#pragma once

#include <cstdint>
#include <vector>

#include "common/isa.hpp"
#include "common/scratch.hpp"
#include "common/status.hpp"

namespace jacpot {

// Outputs are cut into slices of at most this many: a tile of all their pairs fits the L2 cache.
inline constexpr std::int64_t gram_max_slice = 16;

enum class GramOutputs { full, trace, diagonal };

// One side's factors of a layer (of one group). Strides count elements; innermost ones are 1.
template <class T>
struct GramFactors {
  const T* activations = nullptr;  // (N, T, I)
  std::int64_t activations_example = 0, activations_position = 0;
  const T* signals = nullptr;  // (N, K, T, O)
  std::int64_t signals_example = 0, signals_output = 0, signals_position = 0;
};

template <class T>
struct GramLayer {
  GramFactors<T> left, right;  // right is not read in a symmetric product
  std::int64_t positions = 1, inputs = 0, outputs = 0;
  const std::int64_t* row_offsets = nullptr;  // kept weights by output unit, or null for all
  const std::int32_t* columns = nullptr;
  bool bias = false;
};

// out: full (N, K, M, K), trace (N, M), diagonal (N, M, K), contiguous. A symmetric product has
// M == N, computes one half and is exactly symmetric.
template <class T>
struct GramProblem {
  std::vector<GramLayer<T>> layers;
  bool symmetric;
  std::int64_t n, m, k;
  GramOutputs outputs;
  T* out;
};

// out (n, m) += left (n, p) · right (m, p)ᵀ, for rows that are given. Symmetric: right is left, and
// what lies below the diagonal is left unspecified.
template <class T>
Status add_row_products(bool symmetric, std::int64_t n, std::int64_t m, std::int64_t p,
                        const T* left, const T* right, T* out, int threads);

// From here on: what the driver and the kernels of each instruction set share.
//
// Both sides are packed in the same way. Examples come in groups of `panel`; the rows (example,
// position, output) of a group in panels of `panel` rows, stored inner index by inner index, so
// that a panel gives a kernel its rows (broadcast) as well as its columns (vectors). A group holds
// for each layer its activations [panel][inputs][panel] and signals [slice][panel][inner][panel].
//
// Where a slice has several outputs, there is a bit for each row (example, position) and each unit:
// whether the unit is active, its signals not zero for all of the slice's outputs. Behind a ReLU
// about half of them are.
template <class T>
struct PackedLayer {
  std::int64_t activations, signals;  // where they begin in a group
  std::int64_t signals_slice;         // elements of one slice
  std::int64_t active;  // where bits of units begin: (slice, panel · positions, words) of 64
  std::int64_t words;
  std::int64_t positions, inputs, outputs;
  std::int64_t inner;  // of the signals: outputs, or outputs · K for the trace
  const std::int64_t* row_offsets;
  const std::int32_t* columns;
  bool bias;
  const T* constant;  // (K, K) products of signals that are the same for all examples, or null
  bool skips_zeros;   // multiplies signals unit by unit, of the active ones only
};

template <class T>
struct GramPlan {
  const PackedLayer<T>* layers;
  std::int64_t n_layers;
  bool symmetric;
  std::int64_t n, m;                    // examples
  const T *const *left, *const *right;  // groups
  std::int64_t slices, slice;           // outputs are cut into slices of at most this many
  std::int64_t width;                   // outputs in all slices; 1 for the trace
  std::int64_t chunk;                   // examples in the rows of a tile
  std::int64_t pairs;                   // slices that a tile of the diagonal does at once; else 1
  std::int64_t part, parts;             // the terms of the sums that are computed, of how many
  std::int64_t row_example, row_output, column_example, column_output;  // strides of out
  bool streams;  // the result is larger than the caches: write past them
  T* out;
};

struct GramTile {
  std::int64_t group, first, columns;  // row group, first example in it, column group
  std::int64_t left_slice, right_slice, pairs;
  bool mirrored;  // write the transpose as well
};

template <class T>
struct GramKernels {
  std::int64_t panel, block, vectors;  // rows of a panel, of a register tile, and vectors of both
  // dst[x·stride + j] = rows[j][x] for x < inner; zero where rows[j] is null, j < panel.
  void (*pack)(const T* const* rows, std::int64_t inner, T* dst, std::int64_t stride);
  // Sets the bits of those x < inner that are not zero in all of `count` rows, clears the others,
  // and tells how many are set. *finite becomes false if a number is not.
  std::int64_t (*mark_active)(const T* const* rows, std::int64_t count, std::int64_t inner,
                              std::uint64_t* active, bool* finite);
  std::int64_t (*scratch)(const GramPlan<T>& plan);  // elements that a tile needs
  void (*tile)(const GramPlan<T>& plan, const GramTile& tile, T* scratch);
  // to (columns, rows) = from (rows, columns) transposed
  void (*transpose)(const T* from, std::int64_t from_stride, std::int64_t rows,
                    std::int64_t columns, T* to, std::int64_t to_stride);
};

struct GramTable {
  GramKernels<float> f32;
  GramKernels<double> f64;
};
JACPOT_DISPATCH_TABLE(GramTable)

// The product in two steps, so that the factors, which only packing reads, can be dropped between
// them, before all of the result takes memory.
template <class T>
class PackedGram {
 public:
  Status pack(const GramProblem<T>& problem, int threads);
  Status run(int threads);

 private:
  T* room(std::int64_t size);
  bool place_groups(std::int64_t size);
  Status run_tiles(int threads, bool are_late, T* scratch, std::int64_t each);

  const GramKernels<T>* kernel_ = nullptr;
  GramPlan<T> plan_{};
  GramOutputs outputs_ = GramOutputs::full;
  std::vector<PackedLayer<T>> layers_;
  std::vector<Scratch<T>> memory_;
  std::vector<T*> left_, right_;
  std::int64_t late_ = 0;  // rows of groups from here on hold the groups before, to be written last
};

}  // namespace jacpot
