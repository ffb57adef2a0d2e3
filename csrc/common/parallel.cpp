#include "common/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <link.h>
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

namespace jacpot {
namespace {

// Exported by GCC's libgomp and, for compatibility, by LLVM's and Intel's runtimes.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct OpenMP {
  GompParallel parallel = nullptr;
  int (*team_size)() = nullptr;
  std::string path = "std::thread";
};

std::atomic<bool> forked{false};
// Registered when the library loads: a fork may come before the first kernel.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

#if defined(__linux__)
int collect_openmp(dl_phdr_info* info, std::size_t, void* out) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string file = path.substr(path.find_last_of('/') + 1);
  for (const char* name : {"libgomp", "libomp", "libiomp5"})
    if (file.rfind(name, 0) == 0) static_cast<std::vector<std::string>*>(out)->push_back(path);
  return 0;
}
#endif

OpenMP find_openmp() {
  std::vector<std::string> paths;
#if defined(__linux__)
  dl_iterate_phdr(collect_openmp, &paths);
#endif
  // Several packages may bring one each; PyTorch's is the one whose workers we share.
  std::stable_partition(paths.begin(), paths.end(), [](const std::string& path) {
    return path.find("/torch") != std::string::npos;
  });
  for (const auto& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
      void* parallel = dlsym(library, "GOMP_parallel");
      void* team_size = dlsym(library, "omp_get_num_threads");
      if (parallel && team_size)
        return {reinterpret_cast<GompParallel>(parallel), reinterpret_cast<int (*)()>(team_size),
                path};
      dlclose(library);
    }
  }
  return {};
}

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

struct Work {
  std::atomic<std::int64_t> next{0};
  std::int64_t tasks;
  TaskFunction function;
  void* context;

  static void drain(void* self) {
    auto& work = *static_cast<Work*>(self);
    for (std::int64_t task;
         (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;)
      work.function(work.context, task);
  }
};

// In a loop: what is waited for is near, unless the thread that owes it has no core to run on.
template <class Condition, class Otherwise>
void wait_until(Condition&& holds, Otherwise&& otherwise) {
  constexpr int patience = 2000;
  for (int turn = 0; !holds(); ++turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (turn >= patience) otherwise();
  }
}
template <class Condition>
void wait_until(Condition&& holds) {
  wait_until(holds, [] { std::this_thread::yield(); });
}

#if defined(__linux__)
int current_core() { return sched_getcpu(); }

// Moves the calling thread to another core than its own, if there is one it may run on.
void change_core() {
  cpu_set_t allowed;
  if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(current_core(), &others);
  if (CPU_COUNT(&others) == 0) return;
  pthread_setaffinity_np(pthread_self(), sizeof others, &others);
  pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
}
#else
int current_core() { return -1; }
void change_core() {}
#endif

// A parallel region. Its helpers may have gone to sleep, and in a virtual machine Linux likes to
// wake them on the very core that the caller runs on: other cores, halted, look taken by another
// guest. OpenMP's barriers spin, so the two would take turns at the scheduler's tick, milliseconds
// for each region. So the caller lets its helpers in before it goes to the barrier, and a helper
// that finds itself on the caller's core moves to another.
class Region {
 public:
  using Role = void (*)(void* context, bool helper);

  static void run(int threads, Role role, void* context) {
    Region region(role, context);
    openmp().parallel(&Region::enter, &region, static_cast<unsigned>(threads), 0);
  }

 private:
  Region(Role role, void* context) : role_(role), context_(context) {}

  static void enter(void* self) {
    auto& region = *static_cast<Region*>(self);
    if (std::this_thread::get_id() == region.caller_) {
      region.role_(region.context_, false);
      const int helpers = openmp().team_size() - 1;
      wait_until([&] { return region.arrived_.load(std::memory_order_relaxed) == helpers; });
    } else {
      if (current_core() == region.core_) change_core();
      region.arrived_.fetch_add(1, std::memory_order_relaxed);
      region.role_(region.context_, true);
    }
  }

  const Role role_;
  void* const context_;
  const std::thread::id caller_ = std::this_thread::get_id();
  const int core_ = current_core();
  std::atomic<int> arrived_{0};
};

// The threads of one region, which serve what its caller hands out until that has returned.
class Team {
 public:
  Team(void (*body)(void*), void* context) : body_(body), context_(context) {}

  // The team of the calling thread, while it leads one and is not in a task of it.
  static Team*& led() {
    static thread_local Team* team = nullptr;
    return team;
  }
  static void take_part(void* self, bool helper) {
    auto& team = *static_cast<Team*>(self);
    helper ? team.follow() : team.lead();
  }
  void run(Work& work) {
    led() = nullptr;
    busy_.store(helpers_, std::memory_order_relaxed);
    post(&work);
    Work::drain(&work);
    wait_until([&] { return busy_.load(std::memory_order_acquire) == 0; });
    led() = this;
  }

 private:
  void lead() {
    helpers_ = openmp().team_size() - 1;
    led() = this;
    body_(context_);
    led() = nullptr;
    post(nullptr);
  }
  void follow() {
    for (unsigned seen = 0;; ++seen) {
      // A scheduler may also put the two on one core later on.
      wait_until([&] { return posted_.load(std::memory_order_acquire) != seen; },
                 [&] {
                   if (core_.load(std::memory_order_relaxed) == current_core()) change_core();
                   std::this_thread::yield();
                 });
      if (!work_) return;
      Work::drain(work_);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }
  void post(Work* work) {
    work_ = work;
    core_.store(current_core(), std::memory_order_relaxed);
    posted_.fetch_add(1, std::memory_order_release);
  }

  void (*const body_)(void*);
  void* const context_;
  int helpers_ = 0;
  alignas(64) std::atomic<unsigned> posted_{0};
  Work* work_ = nullptr;
  std::atomic<int> core_{-1};  // on which the caller was last seen
  alignas(64) std::atomic<int> busy_{0};
};

bool openmp_usable() { return openmp().parallel && !forked; }

}  // namespace

void run_tasks(int threads, std::int64_t tasks, TaskFunction function, void* context) {
  const auto team = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  Work work{.tasks = tasks, .function = function, .context = context};
  if (team <= 1) {
    Work::drain(&work);
  } else if (Team::led() && !forked) {
    Team::led()->run(work);
  } else if (openmp_usable()) {
    Region::run(team, [](void* self, bool) { Work::drain(self); }, &work);
  } else {
    std::vector<std::thread> helpers;
    try {
      for (int i = 1; i < team; ++i) helpers.emplace_back(&Work::drain, &work);
    } catch (...) {
      // The system has no more threads: the ones that started, and this one, do all the tasks.
    }
    Work::drain(&work);
    for (auto& helper : helpers) helper.join();
  }
}

void run_with_team(int threads, void (*body)(void*), void* context) {
  if (threads <= 1 || Team::led() || !openmp_usable()) return body(context);
  Team team(body, context);
  Region::run(threads, &Team::take_part, &team);
}

const char* thread_runtime() { return forked ? "std::thread" : openmp().path.c_str(); }

}  // namespace jacpot
