#include "common/cuda_emulator.hpp"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace jacpot::emulator {
namespace {

constexpr std::size_t stack_bytes = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, zeros;
};

enum class State { ready, at_block_barrier, at_warp_barrier, ended };

struct Fiber {
  ucontext_t context{};
  unsigned char* stack = nullptr;
  dim3 thread;
  State state = State::ready;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// One block at a time, on the calling thread.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::array<std::uint64_t, 4>> slots;
  std::unique_ptr<unsigned char[]> shared;
  std::size_t current = 0;
  ucontext_t scheduler{};
  const std::function<void()>* body = nullptr;
  const char* fault = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  void* fake_stack = nullptr;
#endif
};

thread_local Block* block_now = nullptr;
thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept from launch to launch

// AddressSanitizer has to be told of every change of stack.
void switch_to_fiber(Block& block) {
  Fiber& fiber = block.fibers[block.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.fake_stack, fiber.stack, stack_bytes);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

void switch_to_scheduler(State state) {
  Block& block = *block_now;
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(state == State::ended ? nullptr : &fake_stack,
                                 block.scheduler_stack, block.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block_now->scheduler_stack,
                                  &block_now->scheduler_stack_bytes);
#endif
  (*block_now->body)();
  switch_to_scheduler(State::ended);
}

void start(Block& block, std::size_t shared_size) {
  // A new allocation each time, of exactly this size: a sanitizer sees what lies outside it.
  block.shared.reset(new unsigned char[shared_size]);
  std::fill_n(block.shared.get(), shared_size, static_cast<unsigned char>(0xff));
  for (auto& fiber : block.fibers) {
    fiber.state = State::ready;
    fiber.groups.clear();
    fiber.open.clear();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, stack_bytes);  // the fiber before never returned
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &fiber_main, 0);
  }
}

// Lets every lane of a warp go on if all wait for it. False where a lane has ended instead.
bool release_warp(Block& block, std::size_t first) {
  const std::size_t last = std::min(first + 32, block.fibers.size());
  std::size_t waiting = 0, ended = 0;
  for (std::size_t i = first; i < last; ++i) {
    waiting += block.fibers[i].state == State::at_warp_barrier;
    ended += block.fibers[i].state == State::ended;
  }
  if (waiting > 0 && ended > 0) return false;
  if (waiting == last - first)
    for (std::size_t i = first; i < last; ++i) block.fibers[i].state = State::ready;
  return true;
}

// Takes one warp as far as it gets without the rest of its block: where a barrier of the block is
// missing, it is then ahead of the others by as much as the hardware could let it be.
bool run_warp(Block& block, std::vector<std::size_t>& lanes, std::minstd_rand& random) {
  for (bool progress = true; progress;) {
    progress = false;
    if (device().order == Order::shuffled) std::shuffle(lanes.begin(), lanes.end(), random);
    for (std::size_t i : lanes) {
      if (block.fibers[i].state != State::ready) continue;
      block.current = i;
      threadIdx = block.fibers[i].thread;
      switch_to_fiber(block);
      progress = true;
    }
    if (!release_warp(block, *std::min_element(lanes.begin(), lanes.end()))) return false;
  }
  return true;
}

bool run_block(Block& block) {
  std::vector<std::vector<std::size_t>> warps((block.fibers.size() + 31) / 32);
  for (std::size_t i = 0; i < block.fibers.size(); ++i) warps[i / 32].push_back(i);
  if (device().order == Order::reverse) {
    std::reverse(warps.begin(), warps.end());
    for (auto& lanes : warps) std::reverse(lanes.begin(), lanes.end());
  }
  std::minstd_rand random(12345);
  for (;;) {
    if (device().order == Order::shuffled) std::shuffle(warps.begin(), warps.end(), random);
    for (auto& lanes : warps)
      if (!run_warp(block, lanes, random)) return false;
    std::size_t ended = 0, waiting = 0;
    for (const auto& fiber : block.fibers) {
      ended += fiber.state == State::ended;
      waiting += fiber.state == State::at_block_barrier;
    }
    if (ended == block.fibers.size()) return true;
    if (waiting != block.fibers.size()) return false;
    for (auto& fiber : block.fibers) fiber.state = State::ready;
  }
}

void carry_out(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<unsigned char*>(copy.to) + copy.bytes, 0, copy.zeros);
}

}  // namespace

Device& device() {
  static Device instance;
  return instance;
}

const char* run_grid(dim3 grid, dim3 block_size, std::size_t shared_size,
                     const std::function<void()>& body) {
  Block block;
  block.body = &body;
  for (unsigned z = 0; z < block_size.z; ++z)
    for (unsigned y = 0; y < block_size.y; ++y)
      for (unsigned x = 0; x < block_size.x; ++x)
        block.fibers.emplace_back().thread = dim3(x, y, z);
  while (stacks.size() < block.fibers.size()) stacks.emplace_back(new unsigned char[stack_bytes]);
  for (std::size_t i = 0; i < block.fibers.size(); ++i) block.fibers[i].stack = stacks[i].get();
  block.slots.resize(block.fibers.size());
  block_now = &block;
  blockDim = block_size;
  gridDim = grid;
  for (unsigned z = 0; !block.fault && z < grid.z; ++z)
    for (unsigned y = 0; !block.fault && y < grid.y; ++y)
      for (unsigned x = 0; !block.fault && x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        start(block, shared_size);
        if (!run_block(block)) block.fault = "threads of a block wait for others that never come";
      }
  block_now = nullptr;
  return block.fault;
}

unsigned char* shared_bytes() { return block_now->shared.get(); }
void fail(const char* fault) { block_now->fault = fault; }
void block_barrier() { switch_to_scheduler(State::at_block_barrier); }
void warp_barrier() { switch_to_scheduler(State::at_warp_barrier); }
int lane() { return static_cast<int>(block_now->current % 32); }

std::array<std::uint64_t, 4>& exchange(int lane_index) {
  return block_now->slots[block_now->current / 32 * 32 + static_cast<std::size_t>(lane_index)];
}

void copy_later(void* to, const void* from, std::size_t bytes, std::size_t size) {
  const auto address =
      reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from);
  if (address % size != 0 || bytes > size) {
    fail("an asynchronous copy is misaligned or too large");
    return;
  }
  const Copy copy{to, from, bytes, size - bytes};
  if (device().order == Order::reverse)
    carry_out(copy);
  else
    block_now->fibers[block_now->current].open.push_back(copy);
}

void close_group() {
  Fiber& fiber = block_now->fibers[block_now->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_groups(int left_over) {
  Fiber& fiber = block_now->fibers[block_now->current];
  while (fiber.groups.size() > static_cast<std::size_t>(left_over)) {
    for (const Copy& copy : fiber.groups.front()) carry_out(copy);
    fiber.groups.erase(fiber.groups.begin());
  }
}

}  // namespace jacpot::emulator
