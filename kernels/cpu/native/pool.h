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

// What a thread will read once a stage is done: `lines` times `width` bytes, each `step` bytes after the one before.
struct Ahead {
    const uint8_t *at;
    int32_t lines, width;
    int64_t step;
};

// Returns when all pieces are done. Memory is idle while threads wait for the last of them: what a thread will read next may be
// fetched into its caches meanwhile.
void wait_for(Stage &stage, int32_t pieces, Ahead ahead = {nullptr, 0, 0, 0});

// Does piece after piece, until all are taken, by this thread or others. `ready(first, count)` is called once pieces are this
// thread's and before it does them: it may wait for what they need. No piece may wait for one of a later stage.
template <typename Ready, typename Work>
inline __attribute__((always_inline)) void share(Stage &stage, int32_t pieces, Ready ready, Work work) {
    int32_t count;
    for (;;) {
        const int32_t first = take(stage, pieces, count);
        if (!count) return;
        ready(first, count);
        for (int32_t piece = first; piece < first + count; piece++) work(piece);
        did(stage, pieces, count);
    }
}

template <typename Work>
inline __attribute__((always_inline)) void share(Stage &stage, int32_t pieces, Work work) {
    share(stage, pieces, [](int32_t, int32_t) {}, work);
}

// Memory of the calling thread, aligned to 64 bytes; `which` of PIECES pieces. Valid until the same piece is asked for again.
// It only grows, and is freed with the thread.
void *scratch(int which, size_t bytes);
enum { SHARED = 0, TOTALS = 1, ATTENTION = 2, NORMED = 3, PIECES = 4 };

}  // namespace moray
#endif
