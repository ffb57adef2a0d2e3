#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "masked_matmul/masked_conv2d.hpp"
#include "masked_matmul/masked_matmul.hpp"

namespace jacpot {
namespace {

using masked_matmul::Activations;
using masked_matmul::Pattern;

Pattern open_pattern(const Array& block) {
  block.expect_cpu().expect_dtype({DType::uint8}).expect_contiguous();
  Pattern pattern;
  raise_if_failed(masked_matmul::open(block.data(), block.size(), &pattern), "Pattern");
  return pattern;
}

// (examples, features) of any strides.
template <class T>
Activations<T> activations(const Array& array, std::int64_t features) {
  const auto view = array.expect_cpu().expect_shape({Array::any, features}).view<T, 2>();
  return {view.data, view.shape[0], view.shape[1], view.stride[0], view.stride[1]};
}

template <class T>
T* vector_of(const Array& array, std::int64_t size) {
  return array.expect_cpu().expect_shape({size}).template contiguous_data<T>();
}

void expect_examples(const Array& array, const Array& like) {
  array.expect_shape({like.shape(0), Array::any});
}

// `allocate(bytes)` returns the array of uint8 that the compiled pattern is written to.
py::object compile_pattern(py::handle mask_object, const py::function& allocate, int threads) {
  const Array mask(mask_object, "mask");
  const auto view = mask.expect_cpu().view<const bool, 2>();
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(view.shape[0]) + 1);
  checked_threads(threads);
  std::int64_t bytes = 0;
  Status status;
  {
    py::gil_scoped_release release;
    status = masked_matmul::measure(view, offsets.data(), &bytes, threads);
  }
  raise_if_failed(status, "Pattern");
  py::object block = allocate(bytes);
  const Array memory(block, "block", Access::write);
  auto* data = memory.expect_cpu().expect_shape({bytes}).contiguous_data<std::uint8_t>();
  {
    py::gil_scoped_release release;
    status = masked_matmul::compile(view, offsets.data(), data, bytes, threads);
  }
  raise_if_failed(status, "Pattern");
  return block;
}

py::dict describe_pattern(py::handle block_object) {
  const Array block(block_object, "block");
  const Pattern pattern = open_pattern(block);
  const auto offset_in_block = [&](const void* p) {
    return static_cast<const char*>(p) - static_cast<const char*>(block.data());
  };
  py::dict out;
  out["shape"] = py::make_tuple(pattern.rows.lines, pattern.rows.length);
  out["nnz"] = pattern.rows.nnz;
  out["row_offsets"] = offset_in_block(pattern.rows.offsets);
  out["column_indices"] = offset_in_block(pattern.rows.indices);
  out["column_index_bytes"] = pattern.rows.index_bytes;
  out["column_offsets"] = offset_in_block(pattern.column_tiles.offsets);
  return out;
}

void compress(py::handle block_object, py::handle weight_object, py::handle values_object,
              int threads) {
  const Array block(block_object, "pattern"), weight(weight_object, "weight"),
      values(values_object, "values", Access::write);
  const Pattern pattern = open_pattern(block);
  weight.expect_cpu().expect_dtype({DType::bfloat16, DType::float32, DType::float64});
  weight.expect_shape({pattern.rows.lines, pattern.rows.length});
  values.expect_like(weight).expect_shape({pattern.rows.nnz}).expect_contiguous();
  const int bytes = weight.dtype() == DType::float64 ? 8 : weight.dtype() == DType::float32 ? 4 : 2;
  Status status;
  {
    py::gil_scoped_release release;
    status = masked_matmul::compress(pattern, bytes, weight.data(), weight.stride(0),
                                     weight.stride(1), values.data(), checked_threads(threads));
  }
  raise_if_failed(status, "compress");
}

void expand(py::handle block_object, py::handle values_object, py::handle weight_object,
            int threads) {
  const Array block(block_object, "pattern"), values(values_object, "values"),
      weight(weight_object, "weight", Access::write);
  const Pattern pattern = open_pattern(block);
  values.expect_cpu().expect_dtype({DType::bfloat16, DType::float32, DType::float64});
  values.expect_shape({pattern.rows.nnz}).expect_contiguous();
  weight.expect_like(values)
      .expect_shape({pattern.rows.lines, pattern.rows.length})
      .expect_contiguous();
  const int bytes = weight.dtype() == DType::float64 ? 8 : weight.dtype() == DType::float32 ? 4 : 2;
  Status status;
  {
    py::gil_scoped_release release;
    status = masked_matmul::expand(pattern, bytes, values.data(), weight.data(),
                                   checked_threads(threads));
  }
  raise_if_failed(status, "expand");
}

void forward(py::handle block_object, py::handle values_object, py::handle bias_object, bool relu,
             py::handle x_object, py::handle y_object, int threads) {
  const Array block(block_object, "pattern"), values(values_object, "values"), x(x_object, "x"),
      y(y_object, "y", Access::write);
  const Pattern pattern = open_pattern(block);
  std::vector<Array> bias;
  if (!bias_object.is_none()) bias.emplace_back(bias_object, "bias");
  values.expect_like(x);
  y.expect_like(x);
  expect_examples(y, x);
  const Status status = dispatch_float(x, [&]<class T>() {
    const T* v = vector_of<const T>(values, pattern.rows.nnz);
    const T* b =
        bias.empty() ? nullptr : vector_of<const T>(bias[0].expect_like(x), pattern.rows.lines);
    const auto in = activations<const T>(x, pattern.rows.length);
    const auto out = activations<T>(y, pattern.rows.lines);
    checked_threads(threads);
    py::gil_scoped_release release;
    return masked_matmul::forward<T>(pattern, v, b, relu, in, out, threads);
  });
  raise_if_failed(status, "masked_matmul");
}

void backward(py::handle block_object, py::handle values_object, py::handle x_object,
              py::handle dy_object, py::handle dx_object, py::handle d_values_object, int threads) {
  const Array block(block_object, "pattern"), values(values_object, "values"), x(x_object, "x"),
      dy(dy_object, "dy");
  const Pattern pattern = open_pattern(block);
  std::vector<Array> dx, d_values;
  if (!dx_object.is_none()) dx.emplace_back(dx_object, "dx", Access::write);
  if (!d_values_object.is_none()) d_values.emplace_back(d_values_object, "d_values", Access::write);
  values.expect_like(dy);
  x.expect_like(dy);
  expect_examples(x, dy);
  const Status status = dispatch_float(dy, [&]<class T>() {
    const T* v = vector_of<const T>(values, pattern.rows.nnz);
    const auto in = activations<const T>(x, pattern.rows.length);
    const auto d_out = activations<const T>(dy, pattern.rows.lines);
    Activations<T> d_in;
    if (!dx.empty()) {
      expect_examples(dx[0].expect_like(dy), dy);
      d_in = activations<T>(dx[0], pattern.rows.length);
    }
    T* dv =
        d_values.empty() ? nullptr : vector_of<T>(d_values[0].expect_like(dy), pattern.rows.nnz);
    checked_threads(threads);
    py::gil_scoped_release release;
    return masked_matmul::backward<T>(pattern, v, in, d_out, d_in, dv, threads);
  });
  raise_if_failed(status, "masked_matmul_backward");
}

using masked_matmul::Axis;
using masked_matmul::Images;

// Size, stride, padding and dilation, each (height, width).
using Window = std::vector<std::array<std::int64_t, 2>>;

struct Convolution {
  Pattern pattern;
  Images images;
};

// Checks x and y (or dy) against the pattern.
Convolution open_convolution(const Array& block, const Array& x, const Array& y,
                             const Window& window) {
  Convolution c{open_pattern(block), {}};
  if (window.size() != 4) throw py::value_error("argument 'window' must be four pairs");
  const auto any = Array::any;
  x.expect_cpu().expect_shape({any, any, any, any}).expect_contiguous();
  y.expect_cpu().expect_like(x).expect_shape({any, any, any, any}).expect_contiguous();
  const auto axis = [&](std::size_t a) {
    const auto [size, stride, padding, dilation] =
        std::array{window[0][a], window[1][a], window[2][a], window[3][a]};
    if (size < 1 || stride < 1 || padding < 0 || dilation < 1)
      throw py::value_error("argument 'window' has an entry that is too small");
    const std::int64_t input = x.shape(static_cast<int>(a) + 2),
                       reach = input + 2 * padding - dilation * (size - 1) - 1;
    return Axis{input, reach < 0 ? 0 : reach / stride + 1, size, stride, padding, dilation};
  };
  c.images = {x.shape(0), x.shape(1), axis(0), axis(1)};
  if (c.pattern.rows.length != c.images.channels * window[0][0] * window[0][1])
    throw py::value_error("argument 'pattern' must have " +
                          std::to_string(c.images.channels * window[0][0] * window[0][1]) +
                          " columns, got " + std::to_string(c.pattern.rows.length));
  y.expect_shape(
      {c.images.count, c.pattern.rows.lines, c.images.height.output, c.images.width.output});
  return c;
}

void convolve(py::handle block_object, py::handle values_object, py::handle bias_object, bool relu,
              py::handle x_object, py::handle y_object, const Window& window, int threads) {
  const Array block(block_object, "pattern"), values(values_object, "values"), x(x_object, "x"),
      y(y_object, "y", Access::write);
  const Convolution c = open_convolution(block, x, y, window);
  std::vector<Array> bias;
  if (!bias_object.is_none()) bias.emplace_back(bias_object, "bias");
  values.expect_like(x);
  const Status status = dispatch_float(x, [&]<class T>() {
    const T* v = vector_of<const T>(values, c.pattern.rows.nnz);
    const T* b =
        bias.empty() ? nullptr : vector_of<const T>(bias[0].expect_like(x), c.pattern.rows.lines);
    const T* in = x.contiguous_data<const T>();
    T* out = y.contiguous_data<T>();
    checked_threads(threads);
    py::gil_scoped_release release;
    return masked_matmul::convolve<T>(c.pattern, c.images, v, b, relu, in, out, threads);
  });
  raise_if_failed(status, "masked_conv2d");
}

void convolve_backward(py::handle block_object, py::handle values_object, py::handle x_object,
                       py::handle dy_object, py::handle dx_object, py::handle d_values_object,
                       const Window& window, int threads) {
  const Array block(block_object, "pattern"), values(values_object, "values"), x(x_object, "x"),
      dy(dy_object, "dy");
  const Convolution c = open_convolution(block, x, dy, window);
  std::vector<Array> dx, d_values;
  if (!dx_object.is_none()) dx.emplace_back(dx_object, "dx", Access::write);
  if (!d_values_object.is_none()) d_values.emplace_back(d_values_object, "d_values", Access::write);
  values.expect_like(x);
  const Status status = dispatch_float(x, [&]<class T>() {
    const T* v = vector_of<const T>(values, c.pattern.rows.nnz);
    T* d_in = nullptr;
    if (!dx.empty()) {
      dx[0].expect_like(x).expect_shape({x.shape(0), x.shape(1), x.shape(2), x.shape(3)});
      d_in = dx[0].contiguous_data<T>();
    }
    T* dv =
        d_values.empty() ? nullptr : vector_of<T>(d_values[0].expect_like(x), c.pattern.rows.nnz);
    const T* in = x.contiguous_data<const T>();
    const T* d_out = dy.contiguous_data<const T>();
    checked_threads(threads);
    py::gil_scoped_release release;
    return masked_matmul::convolve_backward<T>(c.pattern, c.images, v, in, d_out, d_in, dv,
                                               threads);
  });
  raise_if_failed(status, "masked_conv2d_backward");
}

}  // namespace

void bind_masked_matmul(py::module_& m) {
  m.def("compile_pattern", &compile_pattern, py::arg("mask"), py::arg("allocate"),
        py::arg("threads"), "Compiles a boolean mask into one block of bytes.");
  m.def("describe_pattern", &describe_pattern, py::arg("block"),
        "Where the sections of a compiled pattern lie.");
  m.def("compress", &compress, py::arg("pattern"), py::arg("weight"), py::arg("values"),
        py::arg("threads"));
  m.def("expand", &expand, py::arg("pattern"), py::arg("values"), py::arg("weight"),
        py::arg("threads"));
  m.def("masked_matmul", &forward, py::arg("pattern"), py::arg("values"),
        py::arg("bias").none(true), py::arg("relu"), py::arg("x"), py::arg("y"),
        py::arg("threads"));
  m.def("masked_matmul_backward", &backward, py::arg("pattern"), py::arg("values"), py::arg("x"),
        py::arg("dy"), py::arg("dx").none(true), py::arg("d_values").none(true),
        py::arg("threads"));
  m.def("masked_conv2d", &convolve, py::arg("pattern"), py::arg("values"),
        py::arg("bias").none(true), py::arg("relu"), py::arg("x"), py::arg("y"), py::arg("window"),
        py::arg("threads"));
  m.def("masked_conv2d_backward", &convolve_backward, py::arg("pattern"), py::arg("values"),
        py::arg("x"), py::arg("dy"), py::arg("dx").none(true), py::arg("d_values").none(true),
        py::arg("window"), py::arg("threads"));
}

}  // namespace jacpot
