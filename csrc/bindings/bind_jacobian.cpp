#include <algorithm>
#include <functional>

#include "bindings/bind.hpp"
#include "bindings/jacobian_factors.hpp"
#include "common/parallel.hpp"
#include "jacobian/gram.hpp"
#include "jacobian/products.hpp"
#include "jacobian/signs.hpp"
#include "jacobian/windows.hpp"

namespace jacpot {
namespace {

GramOutputs outputs_named(const std::string& name) {
  if (name == "full") return GramOutputs::full;
  if (name == "trace") return GramOutputs::trace;
  if (name == "diagonal") return GramOutputs::diagonal;
  throw py::value_error("argument 'outputs' must be 'full', 'trace' or 'diagonal', got '" + name +
                        "'");
}

// The fused Gram matrix of layers that are given as factors. They are packed when this is made, and
// not needed any more when it runs.
class PackedFactors {
 public:
  // layers: tuples (left, right or None, row offsets or None, columns or None, bias), where left
  // and right are pairs (activations, signals). out: (N, K, M, K), (N, M) or (N, M, K).
  PackedFactors(const py::list& layers, const std::string& outputs, py::handle out, int threads)
      : threads_(checked_threads(threads)) {
    const Array result(out, "out", Access::write);
    result.expect_cpu().expect_contiguous();
    dispatch_float(result, [&]<class T>() {
      GramProblem<T> problem{};
      std::vector<Array> factors;  // alive until packed
      problem.symmetric = true;
      problem.outputs = outputs_named(outputs);
      problem.out = static_cast<T*>(result.data());
      for (const py::handle item : layers)
        read_layer(item.cast<py::tuple>(), result, factors, problem);
      switch (problem.outputs) {
        case GramOutputs::full:
          result.expect_shape({problem.n, problem.k, problem.m, problem.k});
          break;
        case GramOutputs::trace:
          result.expect_shape({problem.n, problem.m});
          break;
        case GramOutputs::diagonal:
          result.expect_shape({problem.n, problem.m, problem.k});
          break;
      }
      auto packed = std::make_shared<PackedGram<T>>();
      Status status;
      {
        py::gil_scoped_release release;
        status = packed->pack(problem, threads_);
      }
      raise_if_failed(status, "gram");
      run_ = [packed](int count) { return packed->run(count); };
    });
    kept_.push_back(result);
  }

  void run() {
    Status status;
    {
      py::gil_scoped_release release;
      status = run_(threads_);
    }
    raise_if_failed(status, "gram");
  }

 private:
  template <class T>
  void read_layer(const py::tuple& entry, const Array& result, std::vector<Array>& factors,
                  GramProblem<T>& problem) {
    const Factors left(entry[0].cast<py::tuple>());
    problem.symmetric = entry[1].is_none();
    const Factors right = problem.symmetric ? left : Factors(entry[1].cast<py::tuple>());
    left.activations.expect_like(result);
    right.activations.expect_like(result);
    const std::int64_t groups = left.activations.shape(2), units = left.signals.shape(4);
    problem.n = left.activations.shape(0);
    problem.m = right.activations.shape(0);
    problem.k = left.signals.shape(1);
    right.signals.expect_shape({problem.m, problem.k, left.activations.shape(1), groups, units});
    right.activations.expect_shape({problem.m, Array::any, groups, left.activations.shape(3)});
    GramLayer<T> layer;
    layer.positions = left.activations.shape(1);
    layer.inputs = left.activations.shape(3);
    layer.outputs = units;
    layer.bias = entry[4].cast<bool>();
    const std::int64_t* offsets = nullptr;
    if (!entry[2].is_none()) {
      const Array row_offsets(entry[2], "row_offsets"), columns(entry[3], "columns");
      offsets = row_offsets.expect_shape({groups * units + 1}).contiguous_data<std::int64_t>();
      layer.columns = columns.contiguous_data<std::int32_t>();
      kept_.insert(kept_.end(), {row_offsets, columns});
    }
    factors.insert(factors.end(),
                   {left.activations, left.signals, right.activations, right.signals});
    for (std::int64_t g = 0; g < groups; ++g) {
      layer.left = left.group<T>(g);
      layer.right = right.group<T>(g);
      layer.row_offsets = offsets ? offsets + g * units : nullptr;
      problem.layers.push_back(layer);
    }
  }

  int threads_;
  std::vector<Array> kept_;  // what `run` reads and writes
  std::function<Status(int)> run_;
};

// out (n, m) += left (n, p) · right (m, p)ᵀ; without a right one, the upper triangle of left ·
// leftᵀ.
void row_products(py::handle left, py::handle right, py::handle out, int threads) {
  const Array result(out, "out", Access::write), rows(left, "left");
  rows.expect_cpu().expect_contiguous().expect_like(result);
  const std::int64_t n = rows.shape(0), p = rows.shape(1);
  const bool symmetric = right.is_none();
  const Array others(symmetric ? left : right, "right");
  const std::int64_t m = others.expect_cpu().expect_contiguous().expect_like(result).shape(0);
  others.expect_shape({m, p});
  result.expect_contiguous().expect_shape({n, m});
  dispatch_float(result, [&]<class T>() {
    T* to = static_cast<T*>(result.data());
    const T *from = static_cast<const T*>(rows.data()),
            *other = static_cast<const T*>(others.data());
    Status status;
    {
      py::gil_scoped_release release;
      status = add_row_products<T>(symmetric, n, m, p, from, other, to, checked_threads(threads));
    }
    raise_if_failed(status, "gram");
  });
}

// out (N, K, R) += J · vᵀ, v (R, P)
void jvp_of_factors(const py::tuple& pair, py::handle row_offsets, py::handle columns, bool bias,
                    bool squared, py::handle v, py::handle out, int threads) {
  const Factors factors(pair, true);
  const Array vectors(v, "v"), result(out, "out", Access::write);
  vectors.expect_cpu().expect_like(factors.activations);
  result.expect_cpu().expect_like(factors.activations);
  dispatch_float(result, [&]<class T>() {
    const auto layer = product_layer<T>(factors, row_offsets, columns, bias, squared);
    const std::int64_t r = vectors.expect_shape({Array::any, layer.parameters()}).shape(0);
    const T* from = vectors.contiguous_data<T>();
    T* to = result.expect_shape({layer.n, layer.k, r}).template contiguous_data<T>();
    Status status;
    {
      py::gil_scoped_release release;
      status = jvp<T>(layer, from, r, to, checked_threads(threads));
    }
    raise_if_failed(status, "jvp");
  });
}

// out (R, P) = uᵀ · J, u (N, K, R)
void vjp_of_factors(const py::tuple& pair, py::handle row_offsets, py::handle columns, bool bias,
                    bool squared, py::handle u, py::handle out, int threads) {
  const Factors factors(pair, true);
  const Array vectors(u, "u"), result(out, "out", Access::write);
  vectors.expect_cpu().expect_like(factors.activations);
  result.expect_cpu().expect_like(factors.activations);
  dispatch_float(result, [&]<class T>() {
    const auto layer = product_layer<T>(factors, row_offsets, columns, bias, squared);
    const std::int64_t r = vectors.expect_shape({layer.n, layer.k, Array::any}).shape(2);
    const T* from = vectors.contiguous_data<T>();
    T* to = result.expect_shape({r, layer.parameters()}).template contiguous_data<T>();
    Status status;
    {
      py::gil_scoped_release release;
      status = vjp<T>(layer, from, r, to, checked_threads(threads));
    }
    raise_if_failed(status, "vjp");
  });
}

template <class T>
void set_signals(RowsLayer<T>& layer, const Array& s) {
  layer.n = s.shape(0);
  layer.k = s.shape(1);
  layer.positions = s.shape(2);
  layer.groups = s.shape(3);
  layer.outputs = s.shape(4);
  layer.signals = static_cast<const T*>(s.data());
  layer.signals_example = s.stride(0);
  layer.signals_output = s.stride(1);
  layer.signals_position = s.stride(2);
  layer.signals_group = s.stride(3);
  layer.signals_unit = s.stride(4);
}

// out (N, K, P_all), columns [offset, offset + G·O·I) = the rows of a layer, all weights kept
template <class T>
void write_rows(const RowsLayer<T>& layer, const Array& out, std::int64_t offset, int threads) {
  T* to = out.expect_shape({layer.n, layer.k, Array::any}).template contiguous_data<T>();
  const std::int64_t width = out.shape(2);
  if (offset < 0 || offset + layer.groups * layer.outputs * layer.inputs > width)
    throw py::value_error("argument 'offset' must leave room for the layer's columns");
  Status status;
  {
    py::gil_scoped_release release;
    status = generate_rows<T>(layer, to + offset, width, checked_threads(threads));
  }
  raise_if_failed(status, "rows");
}

void rows_of_factors(const py::tuple& pair, py::handle out, std::int64_t offset, int threads) {
  const Factors f(pair, true);
  const Array result(out, "out", Access::write);
  result.expect_cpu().expect_like(f.activations);
  dispatch_float(result, [&]<class T>() {
    const Array& a = f.activations;
    RowsLayer<T> layer{};
    set_signals(layer, f.signals);
    layer.inputs = a.shape(3);
    layer.activations = static_cast<const T*>(a.data());
    layer.activations_example = a.stride(0);
    layer.activations_position = a.stride(1);
    layer.activations_group = a.stride(2);
    write_rows(layer, result, offset, threads);
  });
}

// The same from windows of x (N, C, ...): runs of `run` elements, the r-th of position t at
// places[t] + runs[r] in a group's channels.
void rows_of_windows(py::handle x, py::handle places, py::handle runs, std::int64_t run,
                     py::handle signals, py::handle out, std::int64_t offset, int threads) {
  const Array result(out, "out", Access::write), from(x, "x"), where(places, "places"),
      starts(runs, "runs"), s(signals, "signals");
  result.expect_cpu();
  from.expect_like(result).expect_contiguous();
  s.expect_like(result).expect_shape(
      {from.shape(0), Array::any, where.shape(0), Array::any, Array::any});
  if (s.shape(2) > 1 && s.stride(2) != 1) Factors::expect_unit_stride(s, 4);
  const std::int64_t* at = where.expect_shape({s.shape(2)}).contiguous_data<std::int64_t>();
  const std::int64_t* in = starts.expect_shape({Array::any}).contiguous_data<std::int64_t>();
  const std::int64_t t = where.shape(0), count = starts.shape(0), groups = s.shape(3);
  std::int64_t size = 1;
  for (int d = 1; d < from.ndim(); ++d) size *= from.shape(d);
  if (groups == 0 || from.shape(1) % groups != 0)
    throw py::value_error("argument 'x' must have as many channels for every group");
  if (run < 1 ||
      (t > 0 && count > 0 &&
       (*std::min_element(at, at + t) + *std::min_element(in, in + count) < 0 ||
        *std::max_element(at, at + t) + *std::max_element(in, in + count) + run > size / groups)))
    throw py::value_error("arguments 'places' and 'runs' must lie in a group's channels of 'x'");
  dispatch_float(result, [&]<class T>() {
    RowsLayer<T> layer{};
    set_signals(layer, s);
    layer.inputs = count * run;
    layer.activations = static_cast<const T*>(from.data());
    layer.activations_example = size;
    layer.activations_group = size / groups;
    layer.places = at;
    layer.runs = in;
    layer.run = run;
    write_rows(layer, result, offset, threads);
  });
}

// out (columns, parameters), columns [first, first + columns)
void random_signs(std::int64_t seed, std::int64_t offset, std::int64_t first, py::handle out,
                  int threads) {
  const Array result(out, "out", Access::write);
  result.expect_cpu().expect_shape({Array::any, Array::any});
  dispatch_float(result, [&]<class T>() {
    T* to = result.contiguous_data<T>();
    py::gil_scoped_release release;
    signs<T>(static_cast<std::uint64_t>(seed), offset, result.shape(1), first,
             first + result.shape(0), to, checked_threads(threads));
  });
}

// out (M, dim) += rows (M, P) times a sparse matrix of signs for parameters [offset, offset + P)
void sparse_sketch(py::handle rows, std::int64_t seed, std::int64_t offset, std::int64_t nonzeros,
                   py::handle out, int threads) {
  const Array from(rows, "rows"), result(out, "out", Access::write);
  from.expect_cpu().expect_like(result).expect_shape({Array::any, Array::any});
  const std::int64_t m = from.shape(0), dim = result.expect_shape({m, Array::any}).shape(1);
  if (nonzeros < 1 || nonzeros > dim)
    throw py::value_error("argument 'nonzeros' must lie between 1 and the columns of 'out'");
  dispatch_float(result, [&]<class T>() {
    T* to = result.contiguous_data<T>();
    const T* data = from.contiguous_data<T>();
    Status status;
    {
      py::gil_scoped_release release;
      status = add_sparse_sketch<T>(data, m, from.shape(1), static_cast<std::uint64_t>(seed),
                                    offset, nonzeros, dim, to, checked_threads(threads));
    }
    raise_if_failed(status, "sketch");
  });
}

// out (N, T, I): x (N, ...) at places (T,) + offsets (I,), counted in an example's elements.
void gather_windows(py::handle x, py::handle places, py::handle offsets, py::handle out,
                    int threads) {
  const Array from(x, "x"), where(places, "places"), inside(offsets, "offsets"),
      result(out, "out", Access::write);
  from.expect_cpu().expect_contiguous().expect_like(result);
  const std::int64_t* at = where.expect_shape({Array::any}).contiguous_data<std::int64_t>();
  const std::int64_t* in = inside.expect_shape({Array::any}).contiguous_data<std::int64_t>();
  const std::int64_t n = from.shape(0), t = where.shape(0), i = inside.shape(0);
  std::int64_t size = 1;
  for (int d = 1; d < from.ndim(); ++d) size *= from.shape(d);
  if (t > 0 && i > 0 &&
      (*std::min_element(at, at + t) + *std::min_element(in, in + i) < 0 ||
       *std::max_element(at, at + t) + *std::max_element(in, in + i) >= size))
    throw py::value_error("arguments 'places' and 'offsets' must lie in an example of 'x'");
  dispatch_float(result, [&]<class T>() {
    T* to = result.expect_shape({n, t, i}).contiguous_data<T>();
    const T* data = static_cast<const T*>(from.data());
    py::gil_scoped_release release;
    windows<T>(data, n, size, at, t, in, i, to, checked_threads(threads));
  });
}

// out (n, n): the part below the diagonal becomes that above.
void mirror(py::handle out, int threads) {
  const Array result(out, "out", Access::write);
  result.expect_cpu();
  dispatch_float(result, [&]<class T>() {
    const std::int64_t n = result.shape(0);
    T* a = result.expect_shape({n, n}).contiguous_data<T>();
    constexpr std::int64_t block = 32;
    py::gil_scoped_release release;
    parallel_for(checked_threads(threads), (n + block - 1) / block, [&](std::int64_t task) {
      const std::int64_t low = task * block, high = std::min(n, low + block);
      for (std::int64_t j0 = 0; j0 < high; j0 += block)
        for (std::int64_t i = low; i < high; ++i)
          for (std::int64_t j = j0; j < std::min(i, j0 + block); ++j) a[i * n + j] = a[j * n + i];
    });
  });
}

}  // namespace

void bind_jacobian(py::module_& m) {
  py::class_<PackedFactors>(m, "JacobianGram",
                            "The fused Gram matrix of layers that are given as factors, packed.")
      .def(py::init<const py::list&, const std::string&, py::handle, int>(), py::arg("layers"),
           py::arg("outputs"), py::arg("out"), py::arg("threads"))
      .def("run", &PackedFactors::run,
           "Computes it, once; the factors need not be there any more.");
  m.def("jacobian_add_row_products", &row_products, py::arg("left"), py::arg("right"),
        py::arg("out"), py::arg("threads"), "Adds the products of rows that are given.");
  m.def("jacobian_mirror", &mirror, py::arg("out"), py::arg("threads"),
        "Copies the upper triangle to the lower.");
  m.def("jacobian_jvp", &jvp_of_factors, py::arg("factors"), py::arg("row_offsets"),
        py::arg("columns"), py::arg("bias"), py::arg("squared"), py::arg("v"), py::arg("out"),
        py::arg("threads"), "Adds the product of a layer's Jacobian with vectors.");
  m.def("jacobian_vjp", &vjp_of_factors, py::arg("factors"), py::arg("row_offsets"),
        py::arg("columns"), py::arg("bias"), py::arg("squared"), py::arg("u"), py::arg("out"),
        py::arg("threads"), "The product of a layer's transposed Jacobian with vectors.");
  m.def("jacobian_rows", &rows_of_factors, py::arg("factors"), py::arg("out"), py::arg("offset"),
        py::arg("threads"), "Writes the rows of a layer.");
  m.def("jacobian_window_rows", &rows_of_windows, py::arg("x"), py::arg("places"), py::arg("runs"),
        py::arg("run"), py::arg("signals"), py::arg("out"), py::arg("offset"), py::arg("threads"),
        "Writes the rows of a convolution.");
  m.def("jacobian_sparse_sketch", &sparse_sketch, py::arg("rows"), py::arg("seed"),
        py::arg("offset"), py::arg("nonzeros"), py::arg("out"), py::arg("threads"),
        "Adds rows times a sparse matrix of random signs.");
  m.def("jacobian_windows", &gather_windows, py::arg("x"), py::arg("places"), py::arg("offsets"),
        py::arg("out"), py::arg("threads"), "Copies what a convolution's kernel is laid on.");
  m.def("jacobian_signs", &random_signs, py::arg("seed"), py::arg("offset"), py::arg("first"),
        py::arg("out"), py::arg("threads"),
        "Random signs that depend on their position and the seed alone.");
}

}  // namespace jacpot
