// Threads for one parallel region at a time, on Linux futexes.
#ifndef MORAY_POOL_H
#define MORAY_POOL_H

#include <stddef.h>
#include <stdint.h>

namespace moray {

// What every thread of a region runs.
typedef void (*Task)(void *argument);

// Runs `task` here, and in those of the other threads that come in time: one that is late finds nothing left to do, and nobody
// waits for it. Returns when all that came have returned. In the calling thread alone if it is within another region, or
// another thread has the pool.
void run(Task task, void *argument);

// A number of equal pieces of work that a region's threads take in turn.
struct Stage {
    int32_t taken, done;
};

// The next `count` pieces to do, one after the other, so that what a thread reads lies together: fewer the fewer are left, for
// all threads to end at the same time; none once all are taken.
int32_t take(Stage &stage, int32_t pieces, int32_t &count);

// So many pieces are done, and what they wrote may be read by whoever waits for all.
void did(Stage &stage, int32_t pieces, int32_t count = 1);

// Returns when all pieces are done.
void wait_for(Stage &stage, int32_t pieces);

// Does piece after piece, until all are done, by this thread or others.
template <typename Work>
inline __attribute__((always_inline)) void share(Stage &stage, int32_t pieces, Work work) {
    int32_t count;
    for (;;) {
        const int32_t first = take(stage, pieces, count);
        if (!count) return;
        for (int32_t piece = first; piece < first + count; piece++) work(piece);
        did(stage, pieces, count);
    }
}

// Memory of the calling thread, aligned to 64 bytes; `which` of four pieces. Valid until the same piece is asked for again.
// It only grows, and is freed with the thread.
void *scratch(int which, size_t bytes);
enum { SHARED = 0, DECODED = 1, TOTALS = 2, ATTENTION = 3 };

}  // namespace moray
#endif
