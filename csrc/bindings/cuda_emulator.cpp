// The module of the tests' emulator: the CUDA bindings over kernels that run on the CPU.
#include "common/cuda_emulator.hpp"

#include "bindings/bind.hpp"

PYBIND11_MODULE(_cuda_emulator, m) {
  m.doc() = "CUDA kernels run on the CPU, to test their logic.";
  jacpot::bind_cuda(m);
  m.def(
      "configure",
      [](std::int64_t shared_bytes, int multiprocessors, int order) {
        jacpot::emulator::device() = {shared_bytes, multiprocessors,
                                      static_cast<jacpot::emulator::Order>(order)};
      },
      pybind11::arg("shared_bytes"), pybind11::arg("multiprocessors"), pybind11::arg("order"),
      "What the device has, and in which order the threads of a block take turns: "
      "0 forward, 1 reverse, 2 shuffled.");
}
