#include "bindings/cuda.hpp"
#include "krylov/cg_cuda.hpp"
#include "krylov/eigen_cuda.hpp"

namespace jacpot {
namespace {

using krylov::CudaColumns;

constexpr std::initializer_list<DType> float64 = {DType::float64};

CudaColumns shape_of(const Array& vectors, const Array& partial) {
  return {vectors.shape(0), vectors.shape(1), partial.shape(0)};
}

void curvature(py::handle x, py::handle y, double damping, py::handle partial, int device,
               std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array a = on_queue(x, "x", queue, float64, {Array::any, Array::any});
  const Array b =
      on_queue(y, "y", queue, {DType::float32, DType::float64}, {a.shape(0), a.shape(1)});
  const Array sums = on_queue(partial, "partial", queue, float64, {Array::any, a.shape(1)});
  dispatch_float(b, [&]<class T>() {
    raise_if_failed(
        krylov::cuda_curvature<T>(shape_of(a, sums), static_cast<const double*>(a.data()),
                                  static_cast<const T*>(b.data()), damping,
                                  static_cast<double*>(sums.data()), queue),
        "cg");
  });
}

void update(py::handle p, py::handle product, double damping, py::handle curvatures, py::handle rz,
            py::handle x, py::handle r, py::handle partial, py::handle negative, int device,
            std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array direction = on_queue(p, "p", queue, float64, {Array::any, Array::any});
  const std::int64_t size = direction.shape(0), count = direction.shape(1);
  const Array q =
      on_queue(product, "product", queue, {DType::float32, DType::float64}, {size, count});
  const Array pq = on_queue(curvatures, "curvature", queue, float64, {Array::any, count});
  const Array before = on_queue(rz, "rz", queue, float64, {count});
  const Array solution = on_queue(x, "x", queue, float64, {size, count});
  const Array residual = on_queue(r, "r", queue, float64, {size, count});
  const Array sums = on_queue(partial, "partial", queue, float64, {pq.shape(0), count});
  const Array flags = on_queue(negative, "negative", queue, {DType::int32}, {count});
  dispatch_float(q, [&]<class T>() {
    raise_if_failed(
        krylov::cuda_update<T>(
            shape_of(direction, pq), static_cast<const double*>(direction.data()),
            static_cast<const T*>(q.data()), damping, static_cast<const double*>(pq.data()),
            static_cast<const double*>(before.data()), static_cast<double*>(solution.data()),
            static_cast<double*>(residual.data()), static_cast<double*>(sums.data()),
            static_cast<std::int32_t*>(flags.data()), queue),
        "cg");
  });
}

void direction(py::handle z, py::handle partial, py::handle rz, py::handle next_rz, py::handle p,
               py::handle working, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array to = on_queue(p, "p", queue, float64, {Array::any, Array::any});
  const std::int64_t size = to.shape(0), count = to.shape(1);
  const Array from = on_queue(z, "z", queue, float64, {size, count});
  const Array sums = on_queue(partial, "partial", queue, float64, {Array::any, count});
  const Array before = on_queue(rz, "rz", queue, float64, {count});
  const Array after = on_queue(next_rz, "next_rz", queue, float64, {count});
  const Array narrow =
      on_queue(working, "working", queue, {DType::float32, DType::float64}, {size, count});
  dispatch_float(narrow, [&]<class T>() {
    raise_if_failed(
        krylov::cuda_direction<T>(
            shape_of(to, sums), static_cast<const double*>(from.data()),
            static_cast<const double*>(sums.data()), static_cast<const double*>(before.data()),
            static_cast<double*>(after.data()), static_cast<double*>(to.data()),
            static_cast<T*>(narrow.data()), queue),
        "cg");
  });
}

void eigen(py::handle a, py::handle values, py::handle vectors, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array matrix = on_queue(a, "a", queue, float64, {Array::any, Array::any});
  const std::int64_t size = matrix.shape(0);
  matrix.expect_shape({size, size});
  const Array found = on_queue(values, "values", queue, float64, {size});
  const Array turns = on_queue(vectors, "vectors", queue, float64, {size, size});
  raise_if_failed(krylov::cuda_eigen(size, static_cast<const double*>(matrix.data()),
                                     static_cast<double*>(found.data()),
                                     static_cast<double*>(turns.data()), queue),
                  "block_cg");
}

}  // namespace

void bind_krylov_cuda(py::module_& m) {
  m.def(
      "cg_blocks",
      [](std::int64_t size, std::int64_t count, int device) {
        std::int64_t blocks = 0;
        raise_if_failed(krylov::cuda_blocks(size, count, {device, 0}, &blocks), "cg");
        return blocks;
      },
      py::arg("size"), py::arg("count"), py::arg("device"),
      "Rows of the partial sums that the other functions take.");
  m.def("cg_curvature", &curvature, py::arg("x"), py::arg("y"), py::arg("damping"),
        py::arg("partial"), py::arg("device"), py::arg("stream"),
        "Partial sums of x·(y + damping x).");
  m.def("cg_update", &update, py::arg("p"), py::arg("product"), py::arg("damping"),
        py::arg("curvature"), py::arg("rz"), py::arg("x"), py::arg("r"), py::arg("partial"),
        py::arg("negative"), py::arg("device"), py::arg("stream"),
        "x += alpha p, r -= alpha q, and partial sums of r·r.");
  m.def("cg_direction", &direction, py::arg("z"), py::arg("partial"), py::arg("rz"),
        py::arg("next_rz"), py::arg("p"), py::arg("working"), py::arg("device"), py::arg("stream"),
        "p = z + beta p, also in the operator's type.");
  m.def(
      "eigen_limit",
      [](int device) {
        std::int64_t size = 0;
        raise_if_failed(krylov::cuda_eigen_limit({device, 0}, &size), "block_cg");
        return size;
      },
      py::arg("device"), "The largest matrix that eigen takes.");
  m.def("eigen", &eigen, py::arg("a"), py::arg("values"), py::arg("vectors"), py::arg("device"),
        py::arg("stream"), "Eigenvalues, in no order, and vectors of a small symmetric matrix.");
}

}  // namespace jacpot
