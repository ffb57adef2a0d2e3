// The instruction sets that were built, what the machine has, and the one in use.
#pragma once

#include <string_view>
#include <type_traits>
#include <vector>

namespace jacpot {

enum class Isa { baseline, avx2, avx512 };

std::string_view isa_name(Isa isa);
const std::vector<Isa>& built_isas();      // in rising order
const std::vector<Isa>& supported_isas();  // built, and this machine can run them
Isa active_isa();                          // the best supported, or the one forced
// False when the name is unknown or not supported here; the choice is then unchanged.
bool force_isa(std::string_view name);  // "" goes back to the best

// Picks an operation's kernel table. Each operation defines `const Table& table()` in the
// namespace of every instruction set.
#if defined(__x86_64__)
#define JACPOT_DISPATCH_TABLE(Table)                   \
  namespace baseline {                                 \
  const Table& table(const Table*);                    \
  }                                                    \
  namespace avx2 {                                     \
  const Table& table(const Table*);                    \
  }                                                    \
  namespace avx512 {                                   \
  const Table& table(const Table*);                    \
  }                                                    \
  inline const Table& active_table(const Table* tag) { \
    switch (active_isa()) {                            \
      case Isa::avx512:                                \
        return avx512::table(tag);                     \
      case Isa::avx2:                                  \
        return avx2::table(tag);                       \
      default:                                         \
        return baseline::table(tag);                   \
    }                                                  \
  }
#else
#define JACPOT_DISPATCH_TABLE(Table) \
  namespace baseline {               \
  const Table& table(const Table*);  \
  }                                  \
  inline const Table& active_table(const Table* tag) { return baseline::table(tag); }
#endif

// The kernels for numbers of type T, of a table that has them as `f32` and `f64`.
template <class Table, class T>
const auto& kernels_of() {
  const Table& table = active_table(static_cast<const Table*>(nullptr));
  if constexpr (std::is_same_v<T, float>)
    return table.f32;
  else
    return table.f64;
}

}  // namespace jacpot
