#include "common/kept_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "common/huge_pages.hpp"
#include "common/parallel.hpp"

namespace jacpot {
namespace {

using Block = KeptMemory::Block;

std::size_t whole_pages(std::size_t bytes) {
  return (bytes + huge_page - 1) / huge_page * huge_page;
}

#if defined(__linux__) && defined(MADV_FREE)

// On the border of huge pages: what the system gives beyond it goes back.
Block map(std::size_t bytes) {
  const std::size_t size = whole_pages(bytes);
  void* given =
      mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (given == MAP_FAILED) return {};
  auto* begin = static_cast<char*>(given);
  const std::size_t before =
      (huge_page - reinterpret_cast<std::uintptr_t>(begin) % huge_page) % huge_page;
  if (before > 0) (void)munmap(begin, before);
  (void)munmap(begin + before + size, huge_page - before);
  advise_huge_pages(begin + before, size);
  return {begin + before, size};
}

void unmap(Block block) { (void)munmap(block.data, block.bytes); }

bool lend_to_system(Block block) { return madvise(block.data, block.bytes, MADV_FREE) == 0; }

#else

Block map(std::size_t bytes) {
  const std::size_t size = whole_pages(bytes);
  return {std::aligned_alloc(huge_page, size), size};
}

void unmap(Block block) { std::free(block.data); }

bool lend_to_system(Block) { return false; }

#endif

}  // namespace

KeptMemory::KeptMemory() { blocks_.reserve(most / least + 1); }  // giving back never allocates

Block KeptMemory::take(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto best = blocks_.end();
  for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
    if (it->bytes >= bytes && it->bytes / 2 <= bytes &&
        (best == blocks_.end() || it->bytes < best->bytes))
      best = it;
  if (best != blocks_.end()) {
    const Block block = *best;
    blocks_.erase(best);
    bytes_ -= block.bytes;
    return block;
  }
  Block block = map(bytes);
  if (!block.data) {
    drop(blocks_.size());
    block = map(bytes);
  }
  return block;
}

void KeptMemory::give_back(Block block) {
  const std::lock_guard lock(mutex_);
  if (block.bytes < least || block.bytes > most || !lend_to_system(block)) return unmap(block);
  blocks_.push_back(block);
  bytes_ += block.bytes;
  std::size_t count = 0;
  for (std::size_t left = bytes_; left > most; ++count) left -= blocks_[count].bytes;
  drop(count);
}

void KeptMemory::release() {
  const std::lock_guard lock(mutex_);
  drop(blocks_.size());
}

std::size_t KeptMemory::kept() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

void KeptMemory::drop(std::size_t count) {
  const auto end = blocks_.begin() + static_cast<std::ptrdiff_t>(count);
  for (auto it = blocks_.begin(); it != end; ++it) {
    bytes_ -= it->bytes;
    unmap(*it);
  }
  blocks_.erase(blocks_.begin(), end);
}

// Never destroyed: results may outlive everything else of a process.
KeptMemory& kept_memory() {
  static auto* memory = new KeptMemory;
  return *memory;
}

void populate([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes,
              [[maybe_unused]] int threads) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  const auto begin = reinterpret_cast<std::uintptr_t>(data), end = begin + bytes;
  const std::uintptr_t first = begin / huge_page;
  const std::uintptr_t small = 4096;  // what is cut off is made when it is written
  parallel_for(threads, static_cast<std::int64_t>((end + huge_page - 1) / huge_page - first),
               [&](std::int64_t task) {
                 const std::uintptr_t at = (first + static_cast<std::uintptr_t>(task)) * huge_page;
                 const std::uintptr_t from = (std::max(at, begin) + small - 1) / small * small,
                                      to = std::min(at + huge_page, end) / small * small;
                 if (from < to)
                   (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);
               });
#endif
}

}  // namespace jacpot
