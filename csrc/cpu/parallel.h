// Loops over threads. The caller says how many threads it may use; small work stays on one.
#pragma once
#include <omp.h>

#include "../platform.h"

namespace MMFAST_NS {

// Threads for a loop of that many nanoseconds: a second one halves the time where its core is idle, but makes
// a short loop wait for it where it is not.
inline int threads_for(double nanoseconds, int threads) { return nanoseconds < 20000.0 ? 1 : threads; }

// body(i, worker) for i in [0, n) on at most `threads` workers, if the work is worth waking them:
// `cost` is the rough number of nanoseconds of one call.
template <class Body>
inline void parallel_for(int64_t n, int threads, double cost, const Body& body) {
  const double worth_waking = 10000.0;
  if (threads <= 1 || n <= 1 || (double)n * cost < worth_waking) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
  const int64_t chunk = n > threads * 32 ? n / (threads * 32) : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
}

}  // namespace MMFAST_NS
