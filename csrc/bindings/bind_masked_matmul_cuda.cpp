#include "bindings/cuda.hpp"
#include "masked_matmul/masked_matmul_cuda.hpp"
#include "masked_matmul/vectors_cuda.hpp"

namespace jacpot {
namespace {

using namespace masked_matmul;

constexpr std::initializer_list<DType> floats = {DType::float16, DType::bfloat16, DType::float32,
                                                 DType::float64};

DType parse_dtype(const std::string& name) {
  for (DType dtype : floats)
    if (name == dtype_name(dtype)) return dtype;
  throw py::type_error("argument 'dtype' must be a floating point type, got " + name);
}

py::tuple plan(const std::string& dtype, std::int64_t columns, std::int64_t batch, bool sampled,
               int device) {
  std::int64_t tile = 0, splits = 0;
  raise_if_failed(
      cuda_plan(parse_dtype(dtype), columns, batch, sampled, {device, 0}, &tile, &splits),
      "masked_matmul");
  return py::make_tuple(tile, splits);
}

void tile_offsets(py::handle row_offsets, py::handle column_indices, std::int64_t columns,
                  std::int64_t tile, py::handle offsets, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  const Array rows = on_queue(row_offsets, "row_offsets", queue, {DType::int32}, {Array::any});
  const Array indices =
      on_queue(column_indices, "column_indices", queue, {DType::int32}, {Array::any});
  if (tile < 1)
    throw py::value_error("argument 'tile' must be at least 1, got " + std::to_string(tile));
  if (rows.size() < 1) throw py::value_error("argument 'row_offsets' must not be empty");
  const Array out = on_queue(offsets, "offsets", queue, {DType::int64},
                             {rows.size() - 1, cuda_tiles(columns, tile) + 1});
  Status status;
  {
    const py::gil_scoped_release release;
    status = cuda_tile_offsets(rows.size() - 1, columns, tile,
                               static_cast<const std::int32_t*>(rows.data()),
                               static_cast<const std::int32_t*>(indices.data()),
                               static_cast<std::int64_t*>(out.data()), queue);
  }
  raise_if_failed(status, "masked_matmul");
}

void walk(py::handle column_indices, py::handle row_order, py::handle offsets, std::int64_t tile,
          std::int64_t splits, py::handle gathered, py::object values, py::object bias, bool relu,
          py::object product, py::object held, py::object sampled, int device,
          std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  CudaWalk w;
  // Any strides: (columns, batch) as the walk sees it.
  const Array from(gathered, "gathered");
  from.expect_dtype(floats).expect_device(device_of(queue)).expect_shape({Array::any, Array::any});
  const DType dtype = from.dtype();
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const Array indices =
      on_queue(column_indices, "column_indices", queue, {DType::int32}, {Array::any});
  const Array order = on_queue(row_order, "row_order", queue, {DType::int32}, {Array::any});
  w.dtype = dtype;
  w.rows = order.size();
  w.columns = from.shape(0);
  w.batch = from.shape(1);
  w.kept = indices.size();
  w.tile = tile;
  w.splits = splits;
  if (tile < 1 || splits < 1) throw py::value_error("'tile' and 'splits' must be at least 1");
  const Array tiles = on_queue(offsets, "tile_offsets", queue, {DType::int64},
                               {w.rows, cuda_tiles(w.columns, tile) + 1});
  w.column_indices = static_cast<const std::int32_t*>(indices.data());
  w.row_order = static_cast<const std::int32_t*>(order.data());
  w.tile_offsets = static_cast<const std::int64_t*>(tiles.data());
  w.gathered = from.data();
  w.gathered_column_stride = from.stride(0);
  w.gathered_batch_stride = from.stride(1);
  w.relu = relu;
  std::vector<Array> kept_alive;
  const auto optional = [&](const py::object& object, const char* name, DType expected,
                            std::initializer_list<std::int64_t> shape) -> void* {
    if (object.is_none()) return nullptr;
    kept_alive.push_back(on_queue(object, name, queue, {expected}, shape));
    return kept_alive.back().data();
  };
  w.values = optional(values, "values", dtype, {w.kept});
  w.bias = optional(bias, "bias", dtype, {w.rows});
  w.product = optional(product, "product", wide, {w.rows, w.batch});
  w.held = optional(held, "held", dtype, {w.rows, w.batch});
  w.sampled = optional(sampled, "sampled", wide, {splits, w.kept});
  w.wants_product = !product.is_none();
  w.wants_sampled = !sampled.is_none();
  if (w.wants_product && values.is_none())
    throw py::value_error("'product' needs 'values' to multiply with");
  if (w.wants_sampled && held.is_none())
    throw py::value_error("'sampled' needs 'held' to multiply with");
  Status status;
  {
    const py::gil_scoped_release release;
    status = cuda_walk(w, queue);
  }
  raise_if_failed(status, "masked_matmul");
}

std::int64_t vector_tile(std::int64_t columns, int device) {
  std::int64_t tile = 0;
  raise_if_failed(cuda_vector_tile(columns, {device, 0}, &tile), "masked_matmul");
  return tile;
}

void multiply_vectors(py::handle block_columns, py::handle begins, std::int64_t tile,
                      py::handle values, py::handle gathered, const py::object& bias, bool relu,
                      py::handle product, int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  CudaVectors v;
  const Array out(product, "product", Access::write);
  out.expect_dtype({DType::bfloat16, DType::float16}).expect_device(device_of(queue));
  out.expect_shape({Array::any, Array::any});
  v.dtype = out.dtype();
  const Array from = on_queue(gathered, "gathered", queue, {v.dtype}, {Array::any, Array::any});
  v.rows = out.shape(0);
  v.batch = out.shape(1);
  v.row_stride = out.stride(0);
  v.batch_stride = out.stride(1);
  v.columns = from.shape(0);
  v.pitch = from.shape(1);
  v.tile = tile;
  v.relu = relu;
  if (tile < 1)
    throw py::value_error("argument 'tile' must be at least 1, got " + std::to_string(tile));
  const Array indices =
      on_queue(block_columns, "block_columns", queue, {DType::int16}, {Array::any, block_vectors});
  const Array offsets =
      on_queue(begins, "begins", queue, {DType::int64},
               {cuda::divide_up(v.rows, window_rows), cuda_tiles(v.columns, tile) + 1});
  const Array blocks =
      on_queue(values, "values", queue, {v.dtype}, {indices.shape(0), block_values});
  v.block_columns = static_cast<const std::int16_t*>(indices.data());
  v.begins = static_cast<const std::int64_t*>(offsets.data());
  v.values = blocks.data();
  v.gathered = from.data();
  v.product = out.data();
  std::vector<Array> alive;
  if (!bias.is_none()) {
    alive.push_back(on_queue(bias, "bias", queue, {v.dtype}, {v.rows}));
    v.bias = alive.back().data();
  }
  Status status;
  {
    const py::gil_scoped_release release;
    status = cuda_multiply_vectors(v, queue);
  }
  raise_if_failed(status, "masked_matmul");
}

}  // namespace

void bind_masked_matmul_cuda(py::module_& m) {
  m.def("masked_matmul_plan", &plan, py::arg("dtype"), py::arg("columns"), py::arg("batch"),
        py::arg("sampled"), py::arg("device"), "How a walk is best cut: (tile, splits).");
  m.def("masked_matmul_tile_offsets", &tile_offsets, py::arg("row_offsets"),
        py::arg("column_indices"), py::arg("columns"), py::arg("tile"), py::arg("offsets"),
        py::arg("device"), py::arg("stream"),
        "Where each row's entries of each tile begin, (rows, tiles + 1).");
  m.def("masked_matmul_walk", &walk, py::arg("column_indices"), py::arg("row_order"),
        py::arg("tile_offsets"), py::arg("tile"), py::arg("splits"), py::arg("gathered"),
        py::arg("values"), py::arg("bias"), py::arg("relu"), py::arg("product"), py::arg("held"),
        py::arg("sampled"), py::arg("device"), py::arg("stream"),
        "Product and sampled product of one walk over a compressed matrix.");
  m.def("masked_matmul_vector_tile", &vector_tile, py::arg("columns"), py::arg("device"),
        "Columns that vectors are best cut into tiles of.");
  m.def("masked_matmul_vectors", &multiply_vectors, py::arg("block_columns"), py::arg("begins"),
        py::arg("tile"), py::arg("values"), py::arg("gathered"), py::arg("bias"), py::arg("relu"),
        py::arg("product"), py::arg("device"), py::arg("stream"),
        "Product of 16-bit numbers on tensor cores, with a matrix cut into vectors.");
}

}  // namespace jacpot
