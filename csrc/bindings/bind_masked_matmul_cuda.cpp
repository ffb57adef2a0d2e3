#include "bindings/cuda.hpp"
#include "masked_matmul/masked_matmul_cuda.hpp"
#include "masked_matmul/slots_cuda.hpp"

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

std::int64_t tile(std::int64_t columns, int device) {
  std::int64_t out = 0;
  raise_if_failed(cuda_tile(columns, {device, 0}, &out), "masked_matmul");
  return out;
}

std::int64_t splits(const std::string& dtype, std::int64_t batch) {
  return cuda_splits(parse_dtype(dtype), batch);
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
  const Array out = on_queue(offsets, "offsets", queue, {DType::int32},
                             {rows.size() - 1, cuda_tiles(columns, tile) + 1});
  Status status;
  {
    const py::gil_scoped_release release;
    status = cuda_tile_offsets(rows.size() - 1, columns, tile,
                               static_cast<const std::int32_t*>(rows.data()),
                               static_cast<const std::int32_t*>(indices.data()),
                               static_cast<std::int32_t*>(out.data()), queue);
  }
  raise_if_failed(status, "masked_matmul");
}

void walk(py::handle places, py::handle run_order, py::handle offsets, std::int64_t tile,
          py::handle gathered, const py::object& values, const py::object& bias, bool relu,
          const py::object& product, const py::object& held, const py::object& sampled, int device,
          std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  CudaWalk w;
  // Any strides: (columns, batch) as the walk sees it.
  const Array from(gathered, "gathered");
  from.expect_dtype(floats).expect_device(device_of(queue)).expect_shape({Array::any, Array::any});
  w.dtype = from.dtype();
  w.columns = from.shape(0);
  w.batch = from.shape(1);
  w.gathered = from.data();
  w.gathered_column_stride = stride_or(from, 0, 0);
  w.gathered_batch_stride = stride_or(from, 1, 1);
  if (tile < 1)
    throw py::value_error("argument 'tile' must be at least 1, got " + std::to_string(tile));
  w.tile = tile;
  if (product.is_none() != values.is_none() || sampled.is_none() != held.is_none())
    throw py::value_error("'product' goes with 'values', and 'sampled' with 'held'");
  const Array entries = on_queue(places, "places", queue, {DType::int16}, {Array::any});
  w.kept = entries.size();
  const Array tiles = on_queue(offsets, "tile_offsets", queue, {DType::int32},
                               {Array::any, cuda_tiles(w.columns, tile) + 1});
  w.rows = tiles.shape(0);
  const Array order =
      on_queue(run_order, "run_order", queue, {DType::int32}, {cuda::divide_up(w.rows, run_rows)});
  w.places = static_cast<const std::int16_t*>(entries.data());
  w.run_order = static_cast<const std::int32_t*>(order.data());
  w.tile_offsets = static_cast<const std::int32_t*>(tiles.data());
  w.relu = relu;
  std::vector<Array> alive;
  const auto optional = [&](const py::object& object, const char* name, DType expected,
                            std::initializer_list<std::int64_t> shape) -> void* {
    if (object.is_none()) return nullptr;
    alive.push_back(on_queue(object, name, queue, {expected}, shape));
    return alive.back().data();
  };
  w.values = optional(values, "values", w.dtype, {w.kept});
  w.bias = optional(bias, "bias", w.dtype, {w.rows});
  w.held = optional(held, "held", w.dtype, {w.rows, w.batch});
  w.splits = cuda_splits(w.dtype, w.batch);
  w.sampled =
      optional(sampled, "sampled", w.dtype == DType::float64 ? DType::float64 : DType::float32,
               {w.splits, w.kept});
  if (!product.is_none()) {
    const Array out(product, "product", Access::write);
    out.expect_dtype({w.dtype}).expect_device(device_of(queue)).expect_shape({w.rows, w.batch});
    w.product = out.data();
    w.product_row_stride = out.stride(0);
    w.product_batch_stride = out.stride(1);
    alive.push_back(out);
  }
  Status status;
  {
    const py::gil_scoped_release release;
    status = cuda_walk(w, queue);
  }
  raise_if_failed(status, "masked_matmul");
}

std::int64_t slot_tile(std::int64_t columns, int device) {
  std::int64_t tile = 0;
  raise_if_failed(cuda_slot_tile(columns, {device, 0}, &tile), "masked_matmul");
  return tile;
}

void multiply_slots(py::handle rotations, py::handle windows, py::handle begins, py::handle places,
                    py::handle sources, std::int64_t tile, py::handle values, py::handle words,
                    py::handle gathered, const py::object& bias, bool relu, py::handle product,
                    int device, std::uintptr_t stream) {
  const cuda::Queue queue{device, stream};
  CudaSlots s;
  const Array out(product, "product", Access::write);
  out.expect_dtype({DType::bfloat16, DType::float16}).expect_device(device_of(queue));
  out.expect_shape({Array::any, Array::any});
  s.dtype = out.dtype();
  s.rows = out.shape(0);
  s.batch = out.shape(1);
  s.row_stride = out.stride(0);
  s.batch_stride = out.stride(1);
  const Array from(gathered, "gathered");
  from.expect_dtype({s.dtype})
      .expect_device(device_of(queue))
      .expect_shape({Array::any, Array::any});
  if (from.shape(1) < s.batch)
    throw py::value_error("argument 'gathered' must have the batch of 'product'");
  s.columns = from.shape(0);
  s.gathered = from.data();
  s.column_stride = stride_or(from, 0, 0);
  s.gathered_batch_stride = stride_or(from, 1, 0);
  s.tile = tile;
  s.relu = relu;
  if (tile < 1)
    throw py::value_error("argument 'tile' must be at least 1, got " + std::to_string(tile));
  const Array turns = on_queue(rotations, "rotations", queue, {DType::uint8},
                               {cuda::divide_up(s.columns, slot_banks)});
  const Array order =
      on_queue(windows, "windows", queue, {DType::int32}, {Array::any, windows_of_warp});
  s.warps = order.shape(0);
  const Array blocks = on_queue(begins, "begins", queue, {DType::int32},
                                {s.warps * windows_of_warp * cuda_tiles(s.columns, tile) + 1});
  const Array at = on_queue(places, "places", queue, {DType::int16}, {Array::any});
  s.slots = at.size();
  const Array which = on_queue(sources, "sources", queue, {DType::int32}, {s.slots});
  const Array kept = on_queue(values, "values", queue, {s.dtype}, {Array::any});
  Array room(words, "words", Access::write);
  room.expect_dtype({DType::int32}).expect_device(device_of(queue));
  room.expect_shape({s.slots + spare_words});
  room.expect_contiguous();
  s.rotations = static_cast<const std::uint8_t*>(turns.data());
  s.windows = static_cast<const std::int32_t*>(order.data());
  s.begins = static_cast<const std::int32_t*>(blocks.data());
  s.places = static_cast<const std::int16_t*>(at.data());
  s.sources = static_cast<const std::int32_t*>(which.data());
  s.values = kept.data();
  s.words = static_cast<std::uint32_t*>(room.data());
  s.product = out.data();
  std::vector<Array> alive;
  if (!bias.is_none()) {
    alive.push_back(on_queue(bias, "bias", queue, {s.dtype}, {s.rows}));
    s.bias = alive.back().data();
  }
  Status status;
  {
    const py::gil_scoped_release release;
    status = cuda_multiply_slots(s, queue);
  }
  raise_if_failed(status, "masked_matmul");
}

}  // namespace

void bind_masked_matmul_cuda(py::module_& m) {
  m.def("masked_matmul_tile", &tile, py::arg("columns"), py::arg("device"),
        "Columns that a walk is best cut into tiles of.");
  m.def("masked_matmul_splits", &splits, py::arg("dtype"), py::arg("batch"),
        "Parts of the batch that a sampled product is summed in.");
  m.def("masked_matmul_tile_offsets", &tile_offsets, py::arg("row_offsets"),
        py::arg("column_indices"), py::arg("columns"), py::arg("tile"), py::arg("offsets"),
        py::arg("device"), py::arg("stream"),
        "Where each row's entries of each tile begin, (rows, tiles + 1).");
  m.def("masked_matmul_walk", &walk, py::arg("places"), py::arg("run_order"),
        py::arg("tile_offsets"), py::arg("tile"), py::arg("gathered"), py::arg("values"),
        py::arg("bias"), py::arg("relu"), py::arg("product"), py::arg("held"), py::arg("sampled"),
        py::arg("device"), py::arg("stream"),
        "Product and sampled product of one walk over a compressed matrix.");
  m.def("masked_matmul_slot_tile", &slot_tile, py::arg("columns"), py::arg("device"),
        "Columns that slots are best cut into tiles of.");
  m.def("masked_matmul_slots", &multiply_slots, py::arg("rotations"), py::arg("windows"),
        py::arg("begins"), py::arg("places"), py::arg("sources"), py::arg("tile"),
        py::arg("values"), py::arg("words"), py::arg("gathered"), py::arg("bias"), py::arg("relu"),
        py::arg("product"), py::arg("device"), py::arg("stream"),
        "Product of 16-bit numbers on tensor cores, with entries in slots.");
}

}  // namespace jacpot
