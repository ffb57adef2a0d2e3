#include "masked_matmul/masked_conv2d.hpp"

#include "masked_matmul/walk.hpp"

namespace jacpot::masked_matmul {
namespace {

// Output positions in panels, image by image.
template <class T>
class Positions {
 public:
  Positions(std::int64_t count, std::int64_t each, int shapes)
      : count_(each > 0 ? count : 0), each_(each), one_(std::max<std::int64_t>(each, 1), shapes) {}
  std::int64_t width() const { return one_.width(); }
  std::int64_t count() const { return count_ * one_.count(); }
  std::int64_t image(std::int64_t panel) const { return panel / one_.count(); }
  std::int64_t position(std::int64_t panel) const { return one_.example(panel % one_.count()); }
  const Shape<T>& shape(std::int64_t panel) const { return one_.shape(panel % one_.count()); }
  // Positions that the panel really holds; its lanes beyond them are zero.
  std::int64_t held(std::int64_t panel) const {
    return std::min(shape(panel).width, each_ - position(panel));
  }

 private:
  std::int64_t count_, each_;
  Panelling<T> one_;
};

// Where the taps of output columns [begin, end) of one row lie inside the image: [low, high).
struct Inside {
  std::int64_t low, high;

  Inside(const Axis& axis, std::int64_t tap, std::int64_t begin, std::int64_t end) {
    // 0 <= o · stride + offset < input
    const std::int64_t offset = tap * axis.dilation - axis.padding;
    const std::int64_t from = offset >= 0 ? 0 : (-offset + axis.stride - 1) / axis.stride;
    const std::int64_t to =
        axis.input - offset <= 0 ? 0 : (axis.input - offset - 1) / axis.stride + 1;
    low = std::clamp(from, begin, end);
    high = std::clamp(to, low, end);
  }
};

// Visits a panel in the runs along the width that one tap of the kernel sees of the first channel:
// f(lane, count, pointer to the first pixel or null where all lies in the padding).
template <class Pixel, class F>
void for_each_run(const Images& images, Pixel* image, std::int64_t tap_height,
                  std::int64_t tap_width, std::int64_t position, std::int64_t count, F&& f) {
  const Axis &h = images.height, &w = images.width;
  std::int64_t row = position / w.output, begin = position % w.output;
  for (std::int64_t lane = 0; lane < count; ++row, begin = 0) {
    const std::int64_t end = std::min(w.output, begin + count - lane);
    const std::int64_t at = row * h.stride + tap_height * h.dilation - h.padding;
    const Inside inside(w, tap_width, begin, end);
    if (at < 0 || at >= h.input || inside.high <= inside.low) {
      f(lane, end - begin, static_cast<Pixel*>(nullptr));
    } else {
      if (inside.low > begin) f(lane, inside.low - begin, static_cast<Pixel*>(nullptr));
      f(lane + inside.low - begin, inside.high - inside.low,
        image + at * w.input + inside.low * w.stride + tap_width * w.dilation - w.padding);
      if (end > inside.high)
        f(lane + inside.high - begin, end - inside.high, static_cast<Pixel*>(nullptr));
    }
    lane += end - begin;
  }
}

// Patches of the images: feature (channel, tap height, tap width).
template <class T, class Pixel>
class Patches {
 public:
  Patches(const Images& images, const Positions<T>& panels, Pixel* data)
      : images_(images), panels_(panels), data_(data) {}

  void load(std::int64_t panel, std::int64_t first, std::int64_t last, T* to) const {
    const std::int64_t width = panels_.shape(panel).width, held = panels_.held(panel),
                       stride = images_.width.stride;
    visit(panel, first, last,
          [&](std::int64_t line, std::int64_t lane, std::int64_t count, Pixel* from) {
            T* target = to + line * width + lane;
            if (!from)
              std::fill_n(target, count, T(0));
            else if (stride == 1)
              std::copy_n(from, count, target);
            else
              for (std::int64_t i = 0; i < count; ++i) target[i] = from[i * stride];
          });
    if (held < width)
      for (std::int64_t line = 0; line < last - first; ++line)
        std::fill_n(to + line * width + held, width - held, T(0));
  }

  // Adds a panel into the pixels its patches came from.
  void add(std::int64_t panel, std::int64_t first, std::int64_t last, const T* from) const {
    const std::int64_t width = panels_.shape(panel).width, stride = images_.width.stride;
    visit(panel, first, last,
          [&](std::int64_t line, std::int64_t lane, std::int64_t count, Pixel* to) {
            const T* source = from + line * width + lane;
            if (to && stride == 1)
              for (std::int64_t i = 0; i < count; ++i) to[i] += source[i];
            else if (to)
              for (std::int64_t i = 0; i < count; ++i) to[i * stride] += source[i];
          });
  }

 private:
  // f(line, lane, count, pixels or null) for every run of features [first, last). Runs are worked
  // out once for each tap, for all channels.
  template <class F>
  void visit(std::int64_t panel, std::int64_t first, std::int64_t last, F&& f) const {
    const Axis &h = images_.height, &w = images_.width;
    const std::int64_t taps = h.kernel * w.kernel, pixels = h.input * w.input,
                       position = panels_.position(panel), held = panels_.held(panel);
    Pixel* image = data_ + panels_.image(panel) * images_.channels * pixels;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const std::int64_t begin = ceil_div(std::max<std::int64_t>(first - tap, 0), taps),
                         end = ceil_div(std::max<std::int64_t>(last - tap, 0), taps);
      for_each_run(images_, image, tap / w.kernel, tap % w.kernel, position, held,
                   [&](std::int64_t lane, std::int64_t count, Pixel* at) {
                     for (std::int64_t c = begin; c < end; ++c)
                       f(c * taps + tap - first, lane, count, at ? at + c * pixels : at);
                   });
    }
  }

  const Images& images_;
  const Positions<T>& panels_;
  Pixel* data_;
};

}  // namespace

template <class T>
Status convolve(const Pattern& pattern, const Images& images, const T* values, const T* bias,
                bool relu, const T* x, T* y, int threads) {
  const std::int64_t each = images.height.output * images.width.output, out = pattern.rows.lines;
  const Positions<T> panels(images.count, each, kernels_of<MaskedMatmulTable, T>().forward);
  const Patches<T, const T> patches(images, panels, x);
  threads = team(threads, pattern.rows.nnz, images.count * each);
  return in_row_tiles(
      pattern, values, panels.width(), threads, [&](const Lines& lines, const T* in_order) {
        return multiply(
            lines, in_order, bias, relu, panels, threads,
            [&](std::int64_t p, std::int64_t first, std::int64_t last, T* panel) {
              patches.load(p, first, last, panel);
            },
            [&](std::int64_t p, std::int64_t first, std::int64_t last, const T* panel) {
              const Activations<T> to{y + panels.image(p) * out * each, each, out, 1, each};
              panels.shape(p).unpack(panel, panels.position(p), first, last, to);
            });
      });
}

template <class T>
Status convolve_backward(const Pattern& pattern, const Images& images, const T* values, const T* x,
                         const T* dy, T* dx, T* d_values, int threads) {
  const std::int64_t each = images.height.output * images.width.output, out = pattern.rows.lines;
  const Positions<T> panels(images.count, each,
                            d_values ? kernels_of<MaskedMatmulTable, T>().backward
                                     : kernels_of<MaskedMatmulTable, T>().forward);
  const Patches<T, const T> patches(images, panels, x);
  const Patches<T, T> d_patches(images, panels, dx);
  const Lines& lines = pattern.column_tiles;
  threads = team(threads, lines.nnz, images.count * each);
  if (dx)
    std::fill_n(dx, images.count * images.channels * images.height.input * images.width.input,
                T(0));
  return in_column_order(
      pattern, values, dx != nullptr, d_values, threads, [&](const T* by_column, T* gradient) {
        // Patches overlap within a channel only: a thread that owns whole channels adds alone.
        return walk_columns(
            lines, by_column, gradient, panels, images.height.kernel * images.width.kernel, threads,
            [&](std::int64_t p, std::int64_t first, std::int64_t last, T* panel) {
              patches.load(p, first, last, panel);
            },
            [&](std::int64_t p, std::int64_t first, std::int64_t last, T* panel) {
              const Activations<const T> from{dy + panels.image(p) * out * each, each, out, 1,
                                              each};
              panels.shape(p).pack(from, panels.position(p), first, last, panel);
            },
            [&](std::int64_t p, std::int64_t first, std::int64_t last, const T* panel) {
              d_patches.add(p, first, last, panel);
            });
      });
}

template Status convolve<float>(const Pattern&, const Images&, const float*, const float*, bool,
                                const float*, float*, int);
template Status convolve<double>(const Pattern&, const Images&, const double*, const double*, bool,
                                 const double*, double*, int);
template Status convolve_backward<float>(const Pattern&, const Images&, const float*, const float*,
                                         const float*, float*, float*, int);
template Status convolve_backward<double>(const Pattern&, const Images&, const double*,
                                          const double*, const double*, double*, double*, int);

}  // namespace jacpot::masked_matmul
