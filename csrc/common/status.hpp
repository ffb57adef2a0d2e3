// What a kernel returns. Kernels never throw: the bindings turn a failed status into an exception.
#pragma once

namespace jacpot {

enum class Code {
  ok,
  invalid_argument,
  overflow,
  out_of_memory,
  unsupported,
  interrupted,
  device_error
};

struct [[nodiscard]] Status {
  Code code = Code::ok;
  const char* message = "";  // static storage

  constexpr bool ok() const { return code == Code::ok; }
};

}  // namespace jacpot
