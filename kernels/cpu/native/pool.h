// Threads for one parallel region at a time, on Linux futexes.
#ifndef MORAY_POOL_H
#define MORAY_POOL_H

#include <stddef.h>
#include <stdint.h>

namespace moray {

// Runs in every thread of a region: its number, and how many there are.
typedef void (*Task)(void *argument, int thread, int threads);

// Runs `task` in as many threads as are set, and returns when all have. In the calling thread alone if it is within another
// region, or another thread has the pool.
void run(Task task, void *argument);

// Within a region: returns when every one of its `threads` has come here.
void barrier(int threads);

// The next number from a counter that the region's threads share.
inline int32_t next(int32_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// Memory of the calling thread, aligned to 64 bytes; `which` of four pieces. Valid until the same piece is asked for again.
// It only grows, and is freed with the thread.
void *scratch(int which, size_t bytes);
enum { SHARED = 0, DECODED = 1, TOTALS = 2, ATTENTION = 3 };

}  // namespace moray
#endif
