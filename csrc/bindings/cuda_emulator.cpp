// The module of the tests' emulator: the CUDA bindings over kernels that run on the CPU.
#include "common/cuda_emulator.hpp"

#include <pybind11/stl.h>

#include <optional>

#include "bindings/bind.hpp"

PYBIND11_MODULE(_cuda_emulator, m) {
  m.doc() = "CUDA kernels run on the CPU, to test their logic.";
  jacpot::bind_cuda(m);
  m.def(
      "configure",
      [](std::optional<std::int64_t> shared_bytes, std::optional<int> multiprocessors,
         std::optional<int> order) {
        auto& device = jacpot::emulator::device();
        if (shared_bytes) device.shared_bytes = *shared_bytes;
        if (multiprocessors) device.multiprocessors = *multiprocessors;
        if (order) device.order = static_cast<jacpot::emulator::Order>(*order);
      },
      pybind11::kw_only(), pybind11::arg("shared_bytes") = pybind11::none(),
      pybind11::arg("multiprocessors") = pybind11::none(),
      pybind11::arg("order") = pybind11::none(),
      "What the device has, and in which order the threads of a block take turns: "
      "0 forward, 1 reverse, 2 shuffled. What is not given stays.");
  m.def(
      "devices",
      [] {
        const auto& device = jacpot::emulator::device();
        return pybind11::make_tuple(device.current, device.launched_on);
      },
      "The current device, and the one that was current at the last launch.");
}
