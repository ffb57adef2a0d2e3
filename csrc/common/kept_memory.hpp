// Memory for large results and scratch, of which what was freed last is kept for the next ones.
//
// The C library asks the system anew for each block beyond 32 MB, and gives back smaller ones when
// the end of its heap is free; the system clears all pages of a block first. Of a kernel of 400 MB
// that takes a fifth of the time, and many times that where the pages of a virtual machine have
// gone back to its host. So a block that is freed is kept, on loan: the system may take its pages
// at any time that it is short of them (MADV_FREE).
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace jacpot {

class KeptMemory {
 public:
  struct Block {
    void* data = nullptr;
    std::size_t bytes = 0;
  };

  // Of a block: smaller ones the C library mostly keeps itself.
  static constexpr std::size_t least = 16 << 20;

  KeptMemory();

  // At least so many bytes, which hold anything, on a border of 2 MB; null if they are not there.
  Block take(std::size_t bytes);
  void give_back(Block block);
  void release();            // all that is kept, to the system
  std::size_t kept() const;  // bytes

 private:
  // Most that is kept: what watches a process may count it, though the system need not.
  static constexpr std::size_t most = std::size_t{1} << 30;

  void drop(std::size_t count);

  mutable std::mutex mutex_;
  std::vector<Block> blocks_;  // by the time they were freed
  std::size_t bytes_ = 0;
};

KeptMemory& kept_memory();

// Has the pages of a range made at once, each by one thread: two that write to a new page at the
// same time would both clear one, and one of these for nothing.
void populate(void* data, std::size_t bytes, int threads);

}  // namespace jacpot
