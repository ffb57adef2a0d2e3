// Memory for a kernel's own use: aligned for any vector, and null instead of an exception.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace jacpot {

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Scratch = std::unique_ptr<T[], AlignedDelete>;

inline constexpr std::size_t scratch_alignment = 64;

// Uninitialised; null when the memory is not there or the size does not fit.
template <class T>
Scratch<T> allocate_scratch(std::int64_t count) {
  const auto limit =
      static_cast<std::int64_t>(INT64_MAX / 2 / static_cast<std::int64_t>(sizeof(T)));
  if (count < 0 || count > limit) return nullptr;
  auto bytes = static_cast<std::size_t>(count) * sizeof(T);
  bytes = (bytes / scratch_alignment + 1) * scratch_alignment;
  return Scratch<T>(static_cast<T*>(std::aligned_alloc(scratch_alignment, bytes)));
}

}  // namespace jacpot
