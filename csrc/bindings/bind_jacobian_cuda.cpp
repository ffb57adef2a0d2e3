#include <vector>

#include "bindings/cuda.hpp"
#include "bindings/jacobian_factors.hpp"
#include "jacobian/gram_cuda.hpp"
#include "jacobian/signs_cuda.hpp"

namespace jacpot {
namespace {

Factors factors_on(cuda::Queue queue, const py::handle& pair, const Array& like) {
  Factors out(pair.cast<py::tuple>(), device_of(queue));
  out.activations.expect_dtype({like.dtype()});
  Factors::expect_unit_stride(out.activations, 3);
  Factors::expect_unit_stride(out.signals, 4);
  return out;
}

// layers: tuples (left, right or None, bias), where left and right are pairs (activations,
// signals). out: (N, K, M, K), (N, M) or (N, M, K).
void tangent_gram(const py::list& layers, const std::string& outputs, const std::string& precision,
                  py::handle out, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  if (outputs != "full" && outputs != "trace" && outputs != "diagonal")
    throw py::value_error("argument 'outputs' must be 'full', 'trace' or 'diagonal', got '" +
                          outputs + "'");
  if (precision != "exact" && precision != "3xtf32" && precision != "tf32")
    throw py::value_error("argument 'precision' must be 'exact', '3xtf32' or 'tf32', got '" +
                          precision + "'");
  if (layers.empty()) throw py::value_error("argument 'layers' must not be empty");
  const GramOutputs wanted = outputs == "full"    ? GramOutputs::full
                             : outputs == "trace" ? GramOutputs::trace
                                                  : GramOutputs::diagonal;
  const CudaGramPrecision allowed = precision == "exact"    ? CudaGramPrecision::exact
                                    : precision == "3xtf32" ? CudaGramPrecision::tf32x3
                                                            : CudaGramPrecision::tf32;
  const Array result(out, "out", Access::write);
  result.expect_device(device_of(queue)).expect_contiguous();
  dispatch_float(result, [&]<class T>() {
    std::vector<GramLayer<T>> list;
    std::vector<Array> alive;
    std::int64_t n = 0, m = 0, k = 0;
    bool symmetric = true;
    for (const py::handle item : layers) {
      const auto entry = item.cast<py::tuple>();
      const Factors left = factors_on(queue, entry[0], result);
      symmetric = entry[1].is_none();
      const Factors right = symmetric ? left : factors_on(queue, entry[1], result);
      const std::int64_t groups = left.activations.shape(2), units = left.signals.shape(4);
      n = left.activations.shape(0);
      m = right.activations.shape(0);
      k = left.signals.shape(1);
      right.signals.expect_shape({m, k, left.activations.shape(1), groups, units});
      right.activations.expect_shape({m, Array::any, groups, left.activations.shape(3)});
      GramLayer<T> layer;
      layer.positions = left.activations.shape(1);
      layer.inputs = left.activations.shape(3);
      layer.outputs = units;
      layer.bias = entry[2].cast<bool>();
      alive.insert(alive.end(), {left.activations, left.signals, right.activations, right.signals});
      for (std::int64_t g = 0; g < groups; ++g) {
        layer.left = left.group<T>(g);
        layer.right = right.group<T>(g);
        list.push_back(layer);
      }
    }
    switch (wanted) {
      case GramOutputs::full:
        result.expect_shape({n, k, m, k});
        break;
      case GramOutputs::trace:
        result.expect_shape({n, m});
        break;
      case GramOutputs::diagonal:
        result.expect_shape({n, m, k});
        break;
    }
    Status status;
    {
      const py::gil_scoped_release release;
      status = cuda_gram<T>(list, symmetric, n, m, k, wanted, allowed,
                            static_cast<T*>(result.data()), queue);
    }
    raise_if_failed(status, "gram");
  });
}

// products (U, N, M), left (N, K, U), right (M, K, U) -> out (N, K, M, K).
void add_units(py::handle products, py::handle left, py::handle right, bool symmetric,
               py::handle out, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array result(out, "out", Access::write);
  result.expect_device(device_of(queue)).expect_contiguous();
  result.expect_shape({Array::any, Array::any, Array::any, Array::any});
  const std::int64_t n = result.shape(0), k = result.shape(1), m = result.shape(2);
  result.expect_shape({n, k, m, k});
  const Array weights = on_queue(products, "products", queue, {result.dtype()}, {Array::any, n, m});
  const std::int64_t units = weights.shape(0);
  const auto signals = [&](py::handle object, const char* name, std::int64_t examples) {
    Array array(object, name);
    array.expect_like(result).expect_shape({examples, k, units});
    Factors::expect_unit_stride(array, 2);
    return array;
  };
  const Array rows = signals(left, "left", n), columns = signals(right, "right", m);
  dispatch_float(result, [&]<class T>() {
    const auto side = [](const Array& a) {
      return typename CudaGramUnits<T>::Side{static_cast<const T*>(a.data()), a.stride(0),
                                             a.stride(1)};
    };
    Status status;
    {
      const py::gil_scoped_release release;
      status = cuda_add_units<T>(
          {units, static_cast<const T*>(weights.data()), side(rows), side(columns)}, symmetric, n,
          m, k, static_cast<T*>(result.data()), queue);
    }
    raise_if_failed(status, "gram");
  });
}

void draw_signs(std::int64_t seed, std::int64_t offset, std::int64_t first, py::handle out,
                int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array result =
      on_queue(out, "out", queue, {DType::float32, DType::float64}, {Array::any, Array::any});
  dispatch_float(result, [&]<class T>() {
    raise_if_failed(cuda_signs<T>(static_cast<std::uint64_t>(seed), offset, result.shape(1), first,
                                  first + result.shape(0), static_cast<T*>(result.data()), queue),
                    "sketch");
  });
}

void mirror(py::handle out, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array result =
      on_queue(out, "out", queue, {DType::float32, DType::float64}, {Array::any, Array::any});
  result.expect_shape({result.shape(0), result.shape(0)});
  dispatch_float(result, [&]<class T>() {
    raise_if_failed(cuda_mirror<T>(result.shape(0), static_cast<T*>(result.data()), queue), "gram");
  });
}

}  // namespace

void bind_jacobian_cuda(py::module_& m) {
  m.def("jacobian_gram", &tangent_gram, py::arg("layers"), py::arg("outputs"), py::arg("precision"),
        py::arg("out"), py::arg("device"), py::arg("stream"),
        "The fused Gram matrix of layers that are given as factors.");
  m.def("jacobian_add_units", &add_units, py::arg("products"), py::arg("left"), py::arg("right"),
        py::arg("symmetric"), py::arg("out"), py::arg("device"), py::arg("stream"),
        "Adds products of signals, weighted by products of the activations that a unit keeps.");
  m.def("jacobian_signs", &draw_signs, py::arg("seed"), py::arg("offset"), py::arg("first"),
        py::arg("out"), py::arg("device"), py::arg("stream"),
        "Random signs that depend on their position and the seed alone.");
  m.def("jacobian_mirror", &mirror, py::arg("out"), py::arg("device"), py::arg("stream"),
        "Copies the upper triangle to the lower.");
}

}  // namespace jacpot
