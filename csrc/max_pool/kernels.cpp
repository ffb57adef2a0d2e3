#include "common/simd.hpp"
#include "max_pool/max_pool.hpp"

namespace jacpot::JACPOT_ISA {
namespace {

template <class T>
struct Pool {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr int lanes = V::width;
  using Ints = decltype(Vec{} < Vec{});
  typedef std::uint8_t Bytes __attribute__((vector_size(lanes)));

  // The first `count` bytes, in two pieces that may overlap.
  static constexpr int half = lanes < 8 ? lanes : 8, quarter = lanes < 4 ? lanes : 4;
  static JACPOT_INLINE void store_first(std::uint8_t* to, const Bytes& v, std::int64_t count) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(&v);
    const auto store_pieces = [=]<int size>() {
      __builtin_memcpy(to, from, size);
      __builtin_memcpy(to + count - size, from + count - size, size);
    };
    if (lanes >= 8 && count >= 8)
      store_pieces.template operator()<half>();
    else if (lanes >= 4 && count >= 4)
      store_pieces.template operator()<quarter>();
    else
      for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  // The places of a row whose tap dx lies in what is pooled, and where it lies at the first.
  struct Across {
    std::int64_t first, count, from;
  };
  static void find_across(const MaxPool& l, Across* across) {
    for (std::int64_t dx = 0; dx < l.kernel[1]; ++dx) {
      const std::int64_t s = l.stride[1], at = dx * l.dilation[1] - l.padding[1],
                         low = at < 0 ? (-at + s - 1) / s : 0,
                         end = at < l.size[1] ? (l.size[1] - at + s - 1) / s : 0,
                         last = end < l.places[1] ? end : l.places[1];
      across[dx] = {low, last > low ? last - low : 0, low * s + at};
    }
  }

  // The first tap of the window at a place that lies in what is pooled.
  static std::int64_t first_tap(const MaxPool& l, int axis, std::int64_t place) {
    const std::int64_t start = place * l.stride[axis] - l.padding[axis];
    return start < 0 ? (-start + l.dilation[axis] - 1) / l.dilation[axis] : 0;
  }

  static JACPOT_INLINE bool is_near(std::int64_t step, const Across& tap, std::int64_t ox,
                                    std::int64_t count) {
    return step == 1 && tap.first <= ox && ox + count <= tap.first + tap.count;
  }

  // Places from ox on of what tap dx sees of a row; -inf outside of it. `Near` says that they are
  // all inside, and lie next to each other.
  template <bool Near>
  static JACPOT_INLINE Vec load_row(const T* x, std::int64_t step, const Across& tap,
                                    std::int64_t ox, std::int64_t count) {
    const std::int64_t skipped = ox - tap.first;
    const T* from = x + tap.from + skipped * (Near ? 1 : step);
    if (Near || is_near(step, tap, ox, count))
      return count == lanes ? V::load(from) : V::load_first(from, count);
    T own[lanes];
    for (int i = 0; i < lanes; ++i)
      own[i] = i + skipped >= 0 && i + skipped < tap.count ? from[i * step]
                                                           : -static_cast<T>(__builtin_inf());
    return V::load(own);
  }

  static void pool(const MaxPool& l, const T* x, std::int64_t planes, bool behind_relu, T* out,
                   std::uint8_t* taps) {
    const std::int64_t width = l.places[1];
    Across across[MaxPool::none];
    find_across(l, across);
    for (std::int64_t ox = 0; ox < width; ox += lanes) {
      const std::int64_t count = width - ox < lanes ? width - ox : lanes;
      T first[lanes];
      for (int i = 0; i < lanes; ++i) first[i] = static_cast<T>(first_tap(l, 1, ox + i));
      const Vec start = V::load(first);
      bool near = true;
      for (std::int64_t dx = 0; dx < l.kernel[1]; ++dx)
        near &= is_near(l.stride[1], across[dx], ox, count);
      const auto pool_part = near ? &pool_rows<true> : &pool_rows<false>;
      for (std::int64_t p = 0; p < planes; ++p)
        pool_part(l, across, start, x + p * l.plane(), ox, count, behind_relu,
                  out + p * l.pooled() + ox, taps + p * l.pooled() + ox);
    }
  }

  // `count` places of each row of a plane, from ox on.
  template <bool Near>
  static void pool_rows(const MaxPool& l, const Across* across, Vec start, const T* x,
                        std::int64_t ox, std::int64_t count, bool behind_relu, T* out,
                        std::uint8_t* taps) {
    for (std::int64_t oy = 0; oy < l.places[0]; ++oy, out += l.places[1], taps += l.places[1]) {
      const std::int64_t top = oy * l.stride[0] - l.padding[0], above = first_tap(l, 0, oy);
      Vec best = V::broadcast(-static_cast<T>(__builtin_inf())),
          tap = start + V::broadcast(static_cast<T>(above * l.kernel[1]));
      for (std::int64_t dy = above; dy < l.kernel[0]; ++dy) {
        const std::int64_t y = top + dy * l.dilation[0];
        if (y >= l.size[0]) break;
        for (std::int64_t dx = 0; dx < l.kernel[1]; ++dx) {
          const Vec v = load_row<Near>(x + y * l.size[1], l.stride[1], across[dx], ox, count);
          const auto larger = (v > best) | (v != v);  // as torch has it
          best = larger ? v : best;
          tap = larger ? V::broadcast(static_cast<T>(dy * l.kernel[1] + dx)) : tap;
        }
      }
      if (behind_relu) tap = best <= V::zero() ? V::broadcast(T(MaxPool::none)) : tap;
      V::store_first(out, best, count);
      const Bytes numbers = __builtin_convertvector(__builtin_convertvector(tap, Ints), Bytes);
      store_first(taps, numbers, count);
    }
  }

  static void pull_back(const MaxPool& l, const T* signals, const std::uint8_t* taps, T* out) {
    __builtin_memset(out, 0, static_cast<std::size_t>(l.plane()) * sizeof(T));
    std::int64_t offsets[MaxPool::none + 1];
    offsets[MaxPool::none] = 0;
    for (std::int64_t d = 0; d < l.kernel[0] * l.kernel[1]; ++d)
      offsets[d] = d / l.kernel[1] * l.dilation[0] * l.size[1] + d % l.kernel[1] * l.dilation[1];
    T nowhere = 0;
    for (std::int64_t oy = 0; oy < l.places[0]; ++oy) {
      std::int64_t at = (oy * l.stride[0] - l.padding[0]) * l.size[1] - l.padding[1];
      for (std::int64_t ox = 0; ox < l.places[1]; ++ox, at += l.stride[1]) {
        const std::int64_t tap = *taps++;
        *(tap == MaxPool::none ? &nowhere : out + at + offsets[tap]) += *signals++;
      }
    }
  }

  static constexpr MaxPoolKernels<T> table() { return {&pool, &pull_back}; }
};

constexpr MaxPoolTable max_pool_table{Pool<float>::table(), Pool<double>::table()};

}  // namespace

const MaxPoolTable& table(const MaxPoolTable*) { return max_pool_table; }

}  // namespace jacpot::JACPOT_ISA
