// Runs independent tasks on the threads that PyTorch already has.
//
// A second OpenMP runtime, or a pool of our own, fights with PyTorch's spinning workers for the
// same cores (pytorch#98836). So nothing is linked: the runtime that is in the process already
// is found by name and called. Without one, and in a forked child, where OpenMP runtimes are
// not usable, plain std::threads are started for the call.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace jacpot {

using TaskFunction = void (*)(void* context, std::int64_t task);

// Calls function(context, task) for every task in [0, tasks), each once, on up to `threads`
// threads. Tasks are claimed in rising order; a task must not throw.
void run_tasks(int threads, std::int64_t tasks, TaskFunction function, void* context);

template <class F>
void parallel_for(int threads, std::int64_t tasks, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_tasks(
      threads, tasks,
      [](void* context, std::int64_t task) { (*static_cast<Body*>(context))(task); },
      const_cast<std::remove_const_t<Body>*>(&body));
}

const char* thread_runtime();  // the path of the OpenMP library in use, or "std::thread"

}  // namespace jacpot
