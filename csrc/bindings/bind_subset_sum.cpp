#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "subset_sum/subset_sum.hpp"

namespace jacpot {
namespace {

void nearest(py::handle samples_object, py::handle targets_object, py::handle subsets_object,
             py::handle sums_object, int threads) {
  const Array samples(samples_object, "samples"), targets(targets_object, "targets"),
      subsets(subsets_object, "subsets", Access::write), sums(sums_object, "sums", Access::write);
  samples.expect_cpu().expect_shape({Array::any, Array::any});
  targets.expect_like(samples).expect_shape({samples.shape(0)});
  auto* subset =
      subsets.expect_cpu().expect_shape({samples.shape(0)}).contiguous_data<std::int64_t>();
  auto* sum = sums.expect_cpu().expect_shape({samples.shape(0)}).contiguous_data<double>();
  checked_threads(threads);
  const Status status = dispatch_float(samples, [&]<class T>() {
    const auto rows = samples.view<const T, 2>();
    const auto goals = targets.view<const T, 1>();
    py::gil_scoped_release release;
    return subset_sum::nearest<T>(rows, goals, subset, sum, threads);
  });
  raise_if_failed(status, "subset_sum");
}

}  // namespace

void bind_subset_sum(py::module_& m) {
  m.attr("subset_sum_max_samples") = subset_sum::max_samples;
  m.def("subset_sum", &nearest, py::arg("samples"), py::arg("targets"), py::arg("subsets"),
        py::arg("sums"), py::arg("threads"),
        "The subset of each row of samples whose sum is nearest to the row's target.");
}

}  // namespace jacpot
