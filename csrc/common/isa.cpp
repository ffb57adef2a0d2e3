#include "common/isa.hpp"

#include <atomic>

namespace jacpot {
namespace {

bool machine_runs(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case Isa::baseline:
      return true;
  }
#endif
  return isa == Isa::baseline;
}

std::atomic<Isa>& choice() {
  static std::atomic<Isa> isa{supported_isas().back()};
  return isa;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

const std::vector<Isa>& built_isas() {
#if defined(__x86_64__)
  static const std::vector<Isa> isas{Isa::baseline, Isa::avx2, Isa::avx512};
#else
  static const std::vector<Isa> isas{Isa::baseline};
#endif
  return isas;
}

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found;
    for (Isa isa : built_isas())
      if (machine_runs(isa)) found.push_back(isa);
    return found;
  }();
  return isas;
}

Isa active_isa() { return choice().load(std::memory_order_relaxed); }

bool force_isa(std::string_view name) {
  if (name.empty()) {
    choice() = supported_isas().back();
    return true;
  }
  for (Isa isa : supported_isas()) {
    if (isa_name(isa) == name) {
      choice() = isa;
      return true;
    }
  }
  return false;
}

}  // namespace jacpot
