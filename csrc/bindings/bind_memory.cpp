#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bindings/array.hpp"
#include "bindings/bind.hpp"
#include "common/huge_pages.hpp"
#include "common/kept_memory.hpp"

namespace jacpot {
namespace {

// Asks for huge pages under an array that is about to be written.
void prefer_huge_pages(py::handle out) {
  const Array result(out, "out", Access::write);
  result.expect_cpu().expect_contiguous();
  dispatch_float(result, [&]<class T>() {
    advise_huge_pages(result.data(), static_cast<std::size_t>(result.size()) * sizeof(T));
  });
}

// Of kept memory, to which it goes back in the end; None if there is not so much.
py::object kept_array(const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  auto bytes = static_cast<std::size_t>(dtype.itemsize());
  for (const py::ssize_t size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return py::none();
  const KeptMemory::Block block = kept_memory().take(bytes);
  if (!block.data) return py::none();
  const py::capsule owner(new KeptMemory::Block(block), [](void* given) {
    const std::unique_ptr<KeptMemory::Block> own(static_cast<KeptMemory::Block*>(given));
    kept_memory().give_back(*own);
  });
  return py::array(dtype, shape, block.data, owner);
}

// Hands memory that was freed back to the system: what is kept here, and what the allocator of the
// C library keeps.
void return_free_memory() {
  py::gil_scoped_release release;
  kept_memory().release();
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("out"),
        "Asks for huge pages under an array that is about to be written.");
  m.def("kept_array", &kept_array, py::arg("shape"), py::arg("dtype"),
        "An array to be written, in memory that is kept for the next one when it is freed.");
  m.attr("KEPT_BYTES") = KeptMemory::least;
  m.def(
      "kept_bytes", [] { return kept_memory().kept(); },
      "How much memory of freed arrays is kept.");
  m.def("return_free_memory", &return_free_memory,
        "Hands memory that was freed back to the system.");
}

}  // namespace jacpot
