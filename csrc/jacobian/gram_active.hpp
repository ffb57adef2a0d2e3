// Products of signals over the units that are not zero.
//
// A hidden unit with a ReLU that is off for an example has a signal of zero for all K outputs of
// this example: about half the columns of δ_n (K, O). So the K rows of one example (or position)
// are multiplied by themselves, and by one vector of columns at a time, which belongs to few
// examples: over the units that are active for the rows and for any of these. Such a tile of K = 10
// rows loads 10 numbers and a vector for 10 products, half as many as a processor can that loads
// two numbers while it multiplies a vector. With few outputs, whose vectors belong to many
// examples, all vectors of a panel are multiplied together.
#pragma once

#include "jacobian/gram_panels.hpp"

namespace jacpot::JACPOT_ISA {

#if JACPOT_VECTOR_BYTES != 64
// Which bits of a byte are set, and how many.
struct ByteNumbers {
  alignas(16) std::uint16_t numbers[256][8] = {};
  std::uint8_t counts[256] = {};
  constexpr ByteNumbers() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) numbers[byte][counts[byte]++] = static_cast<std::uint16_t>(bit);
  }
};
static constexpr ByteNumbers byte_numbers;
#endif

// How many numbers beyond its end a list may be written.
static constexpr int beyond_list = 16;

// The numbers of the bits that are set, and how many.
JACPOT_INLINE std::int64_t list_bits(const std::uint64_t* words, std::int64_t n,
                                     std::uint32_t* to) {
  std::int64_t count = 0;
#if JACPOT_VECTOR_BYTES == 64
  __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::int64_t w = 0; w < n; ++w)
    for (int shift = 0; shift < 64; shift += 16) {
      const auto bits = static_cast<__mmask16>(words[w] >> shift);
      _mm512_storeu_si512(to + count, _mm512_maskz_compress_epi32(bits, numbers));
      count += __builtin_popcount(bits);
      numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
    }
#else
  typedef std::uint16_t Bits __attribute__((vector_size(16)));
  typedef std::uint32_t Numbers __attribute__((vector_size(32)));
  Numbers first{};
  for (std::int64_t w = 0; w < n; ++w)
    for (int shift = 0; shift < 64; shift += 8, first += std::uint32_t{8}) {
      const std::uint64_t byte = words[w] >> shift & 255;
      Bits bits;
      std::memcpy(&bits, byte_numbers.numbers[byte], sizeof bits);
      const Numbers numbers = __builtin_convertvector(bits, Numbers) + first;
      std::memcpy(to + count, &numbers, sizeof numbers);
      count += byte_numbers.counts[byte];
    }
#endif
  return count;
}

// The bits of the rows (example, position) of a group, of one slice of outputs.
struct ActiveUnits {
  const std::uint64_t* bits;  // (row, words)
  std::int64_t words;
  JACPOT_INLINE const std::uint64_t* row(std::int64_t row) const { return bits + row * words; }
};

template <class T>
struct ActiveSignals {
  using V = Simd<T>;
  using Line = typename Panels<T>::Line;
  static constexpr int width = Panels<T>::width, vectors = Panels<T>::vectors,
                       panel = Panels<T>::panel, block = Panels<T>::block;
  static constexpr int segment = 512;  // units whose rows are held at a time
  // Outputs: with more, and registers for as many rows, vectors of columns go one by one.
  static constexpr int few = JACPOT_VECTOR_BYTES == 64 ? 5 : gram_max_slice;

  std::int64_t outputs;  // rows of a unit
  T* values;             // (block, segment, outputs), may be written a vector beyond its end

  static std::int64_t scratch(std::int64_t outputs) { return block * segment * outputs + width; }

  // The rows of one example at those of its units, counted from `first`, that are active. The rows
  // may lie in several panels; what they are gathered to may be overwritten beyond its end.
  void gather(const PackedSignals<T>& s, std::int64_t row, std::int64_t first,
              const std::uint64_t* active, std::int64_t words, T* to) const {
    struct Run {
      const T* first;
      std::int64_t at, size;
    } runs[gram_max_slice];
    int n_runs = 0;
    for (std::int64_t k = 0; k < outputs; k += runs[n_runs++].size) {
      const std::int64_t in_panel = panel - (row + k) % panel;
      runs[n_runs] = {s.row(row + k) + first * panel, k, min(min(width, in_panel), outputs - k)};
    }
    std::uint32_t units[segment + beyond_list];
    const std::int64_t count = list_bits(active, words, units);
    for (std::int64_t u = 0; u < count; ++u)
      for (int i = 0; i < n_runs; ++i)
        V::store(to + units[u] * outputs + runs[i].at,
                 V::load_first(runs[i].first + units[u] * panel, runs[i].size));
  }

  // What is multiplied: rows of the left, and one panel of units on the right, of so many outputs
  // each, `columns` in all.
  struct Terms {
    PackedSignals<T> signals;
    ActiveUnits left, right;
    std::int64_t right_outputs, columns;
    GramPlace<T> place;
    const T* a;        // the activations' products, spread over the columns
    const Line* line;  // of each row
  };

  // Units from `first` on, 64 a word.
  struct Segment {
    std::int64_t first, words;
    JACPOT_INLINE const std::uint64_t* of(const ActiveUnits& units, std::int64_t row) const {
      return units.row(row) + first / 64;
    }
  };

  // Row r of the place and `C` vectors, which are zero but at `live` units, from `column` on.
  template <int C>
  void add_vectors(const Terms& t, const Segment& x, const std::uint64_t* live, std::int64_t r,
                   std::int64_t column) const {
    constexpr int most = min(block * vectors / C, gram_max_slice);  // rows whose sums fit registers
    const T* right =
        t.signals.right + (column / panel * t.signals.inner + x.first) * panel + column % panel;
    const std::uint64_t* left = x.of(t.left, t.place.unit + r);
    std::uint64_t both[segment / 64];
    std::uint32_t units[segment + beyond_list];
    for (std::int64_t w = 0; w < x.words; ++w) both[w] = live[w] & left[w];
    const std::int64_t count = list_bits(both, x.words, units);
    const std::int64_t parts = (outputs + most - 1) / most;
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t k = part * outputs / parts, next = (part + 1) * outputs / parts;
      with_count<most>(next - k, [&](auto rows) {
        RegisterTile<T, rows.value, C> sums;
        sums.add(values + r * segment * outputs + k, outputs, right, panel, units, count);
        Panels<T>::multiply_into(t.place.out + column, t.a + column, t.line + r * outputs + k,
                                 rows.value, sums);
      });
    }
  }

  template <int C>
  void add_segment(const Terms& t, const Segment& x) const {
    constexpr std::int64_t step = C * width;
    const std::int64_t count = (t.columns + step - 1) / step;
    std::uint64_t live[gram_max_slice * vectors][segment / 64] = {};
    for (std::int64_t c = 0; c < count; ++c) {
      const std::int64_t end = min((c + 1) * step, t.columns);
      for (std::int64_t unit = c * step / t.right_outputs; unit * t.right_outputs < end; ++unit)
        for (std::int64_t w = 0; w < x.words; ++w) live[c][w] |= x.of(t.right, unit)[w];
    }
    // What stays in L1: a whole panel of columns, or the rows of one example.
    const std::int64_t stretch = C == vectors ? 1 : count;
    for (std::int64_t begin = t.place.skip * panel / step; begin < count; begin += stretch)
      for (std::int64_t r = 0; r < t.place.count; ++r)
        for (std::int64_t c = begin; c < min(begin + stretch, count); ++c)
          add_vectors<C>(t, x, live[c], r, c * step);
  }

  // Σ over the signals' inner index.
  void add(const Terms& t) const {
    for (std::int64_t first = 0; first < t.signals.inner; first += segment) {
      const Segment x{first, min(segment / 64, t.left.words - first / 64)};
      for (std::int64_t r = 0; r < t.place.count; ++r)
        gather(t.signals, (t.place.unit + r) * outputs, first, x.of(t.left, t.place.unit + r),
               x.words, values + r * segment * outputs);
      if (t.right_outputs <= few)
        add_segment<vectors>(t, x);
      else
        add_segment<1>(t, x);
    }
  }
};

}  // namespace jacpot::JACPOT_ISA
