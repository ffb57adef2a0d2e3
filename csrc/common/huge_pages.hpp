// Large fresh results are written once, so that the page faults of small pages cost as much as the
// writing: where the system allows it on request, ask for huge ones.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jacpot {

inline constexpr std::size_t huge_page = 2 << 20;

inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = huge_page;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + page - 1) / page * page,
                       last = (begin + bytes) / page * page;
  // Advice only: pages that exist already stay as they are, and a failure changes nothing.
  if (last > first + page)
    (void)madvise(reinterpret_cast<void*>(first), static_cast<std::size_t>(last - first),
                  MADV_HUGEPAGE);
#endif
}

}  // namespace jacpot
