// Memory for a kernel's own use: aligned for any vector, and null instead of an exception.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/huge_pages.hpp"
#include "common/kept_memory.hpp"

namespace jacpot {

struct ScratchDelete {
  KeptMemory::Block kept;
  void operator()(void* p) const {
    if (kept.data)
      kept_memory().give_back(kept);
    else
      std::free(p);
  }
};

template <class T>
using Scratch = std::unique_ptr<T[], ScratchDelete>;

inline constexpr std::size_t scratch_alignment = 64;

// Uninitialised; null when the memory is not there or the size does not fit.
template <class T>
Scratch<T> allocate_scratch(std::int64_t count, std::size_t alignment = scratch_alignment) {
  const auto limit =
      static_cast<std::int64_t>(INT64_MAX / 2 / static_cast<std::int64_t>(sizeof(T)));
  if (count < 0 || count > limit) return nullptr;
  auto bytes = static_cast<std::size_t>(count) * sizeof(T);
  bytes = (bytes / alignment + 1) * alignment;
  if (bytes >= KeptMemory::least) {
    const KeptMemory::Block block = kept_memory().take(bytes);
    return Scratch<T>(static_cast<T*>(block.data), ScratchDelete{block});
  }
  return Scratch<T>(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
}

// For what is to fill a cache and stay there: small pages, scattered over memory, would want some
// of its sets twice and leave others empty.
template <class T>
Scratch<T> allocate_resident(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  if (bytes < huge_page) return allocate_scratch<T>(count);
  auto memory = allocate_scratch<T>(count, huge_page);
  if (memory) advise_huge_pages(memory.get(), (bytes / huge_page + 1) * huge_page);
  return memory;
}

}  // namespace jacpot
