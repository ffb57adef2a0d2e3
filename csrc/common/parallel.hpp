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

// Parts of size b that a is cut into.
inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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

// Runs body() on the calling thread. The parallel_for calls in it are served by threads that stand
// by meanwhile, waiting in a loop: two cache lines change hands for a call, and not the bookkeeping
// of a parallel region. For bodies that call parallel_for every few microseconds, and no other
// library that brings threads of its own.
void run_with_team(int threads, void (*body)(void*), void* context);

template <class F>
void with_team(int threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_with_team(
      threads, [](void* context) { (*static_cast<Body*>(context))(); },
      const_cast<std::remove_const_t<Body>*>(&body));
}

const char* thread_runtime();  // the path of the OpenMP library in use, or "std::thread"

}  // namespace jacpot
