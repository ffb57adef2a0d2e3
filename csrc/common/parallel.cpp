#include "common/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <link.h>
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
      if (void* symbol = dlsym(library, "GOMP_parallel"))
        return {reinterpret_cast<GompParallel>(symbol), path};
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

}  // namespace

void run_tasks(int threads, std::int64_t tasks, TaskFunction function, void* context) {
  const auto team = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  Work work{.tasks = tasks, .function = function, .context = context};
  if (team <= 1) {
    Work::drain(&work);
  } else if (openmp().parallel && !forked) {
    openmp().parallel(&Work::drain, &work, static_cast<unsigned>(team), 0);
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

const char* thread_runtime() { return forked ? "std::thread" : openmp().path.c_str(); }

}  // namespace jacpot
