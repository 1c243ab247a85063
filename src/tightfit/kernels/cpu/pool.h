// One pool of threads for all kernels.
#pragma once

#include <cstddef>

namespace tightfit {

// Calls work(context, task) once for each task in [0, tasks), on the calling thread and up to `threads` - 1 workers, and
// returns when all are done. Workers wait for the next call spinning for 100 microseconds, then asleep. A call that
// comes while another thread's is running does its work alone, and so does one in a process without threads to spare.
void parallel(size_t tasks, size_t threads, void (*work)(void* context, size_t task), void* context);

template <class Work>
void parallel_for(size_t tasks, size_t threads, Work work) {
    parallel(tasks, threads, [](void* context, size_t task) { (*static_cast<Work*>(context))(task); }, &work);
}

}  // namespace tightfit
