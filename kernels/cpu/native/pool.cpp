#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "moray_cpu.h"

namespace moray {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int BARRIER_SPINS = 2000;  // a barrier between stages of a step is passed within microseconds, or a core is missing

std::atomic<uint32_t> started{0};  // counts regions; workers sleep on it
std::atomic<int32_t> running{0};   // workers that have not ended the region; the caller sleeps on it
std::atomic<int32_t> asleep{0};    // workers that sleep
std::atomic<uint32_t> phase{0};    // counts barriers passed
std::atomic<int32_t> arrived{0};
std::atomic<int32_t> at_barrier{0};
std::atomic<int32_t> caller_sleeps{0};
std::atomic<int32_t> spin_ns{20000};

std::atomic<int> pool_threads{1};  // what calls use

pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;  // whoever has it runs a region; guards the rest
int made = 0;                                           // workers that exist
uint32_t made_at[MAX_THREADS];                          // regions that were over when each worker was made
pid_t made_by = 0;
Task region_task;
void *region_argument;
int region_threads = 1;
thread_local bool in_region = false;

template <typename Word>
void sleep_on(std::atomic<Word> &word, Word seen) {
    // With a limit: a wake-up that was lost for whatever reason costs time, and nothing hangs.
    timespec limit = {0, 100 * 1000 * 1000};
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(seen), &limit, nullptr, 0);
}

template <typename Word>
void wake(std::atomic<Word> &word, int count) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

int64_t now_ns() {
    timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

void *work(void *number) {
    const int thread = static_cast<int>(reinterpret_cast<intptr_t>(number));
    uint32_t seen = made_at[thread];
    in_region = true;
    for (;;) {
        const int64_t until = now_ns() + spin_ns.load(std::memory_order_relaxed);
        while (started.load(std::memory_order_acquire) == seen && now_ns() < until)
            for (int i = 0; i < 50; i++) pause_cpu();
        while (started.load() == seen) {
            asleep.fetch_add(1);
            sleep_on(started, seen);
            asleep.fetch_sub(1);
        }
        seen = started.load();
        if (thread < region_threads) region_task(region_argument, thread, region_threads);
        if (running.fetch_sub(1) == 1 && caller_sleeps.load()) wake(running, 1);
    }
    return nullptr;
}

// Makes the workers that are missing; with the lock held. How many threads there are then.
int ready_threads() {
    if (made_by != getpid()) {  // after a fork there are none
        made = 0;
        made_by = getpid();
        running = asleep = arrived = at_barrier = 0;
    }
    const int wanted = pool_threads;
    while (made < wanted - 1) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        made_at[made + 1] = started;
        const int failed = pthread_create(&thread, &attributes, work, reinterpret_cast<void *>(static_cast<intptr_t>(made + 1)));
        pthread_attr_destroy(&attributes);
        if (failed) break;
        made++;
    }
    return made + 1 < wanted ? made + 1 : wanted;
}

}  // namespace

void run(Task task, void *argument) {
    if (in_region || pthread_mutex_trylock(&pool_lock) != 0) {
        task(argument, 0, 1);
        return;
    }
    const int threads = ready_threads();
    in_region = true;
    if (threads == 1) {
        task(argument, 0, 1);
    } else {
        region_task = task;
        region_argument = argument;
        region_threads = threads;
        running = made;
        started.fetch_add(1);
        if (asleep.load()) wake(started, MAX_THREADS);
        task(argument, 0, threads);
        for (int i = 0; i < BARRIER_SPINS && running.load(std::memory_order_acquire); i++) pause_cpu();
        while (int32_t left = running.load()) {
            caller_sleeps = 1;
            sleep_on(running, left);
            caller_sleeps = 0;
        }
    }
    in_region = false;
    pthread_mutex_unlock(&pool_lock);
}

void barrier(int threads) {
    if (threads == 1) return;
    const uint32_t seen = phase.load();
    if (arrived.fetch_add(1) == threads - 1) {
        arrived = 0;
        phase.fetch_add(1);
        if (at_barrier.load()) wake(phase, MAX_THREADS);
        return;
    }
    for (int i = 0; i < BARRIER_SPINS; i++) {
        if (phase.load(std::memory_order_acquire) != seen) return;
        pause_cpu();
    }
    at_barrier.fetch_add(1);
    while (phase.load() == seen) sleep_on(phase, seen);
    at_barrier.fetch_sub(1);
}

namespace {
struct Arena {
    void *memory[4] = {nullptr, nullptr, nullptr, nullptr};
    size_t bytes[4] = {0, 0, 0, 0};
    ~Arena() {
        for (void *piece : memory) free(piece);
    }
};
thread_local Arena arena;
}  // namespace

void *scratch(int which, size_t bytes) {
    if (arena.bytes[which] < bytes) {
        free(arena.memory[which]);
        bytes += bytes / 2;
        if (posix_memalign(&arena.memory[which], 64, bytes)) abort();  // as any other failed allocation of a few MB
        arena.bytes[which] = bytes;
    }
    return arena.memory[which];
}

}  // namespace moray

extern "C" int moray_set_threads(int threads, int spin_us) {
    if (threads < 1 || threads > moray::MAX_THREADS || spin_us < 0 || spin_us > 1000000) return -1;
    moray::pool_threads = threads;
    moray::spin_ns = spin_us * 1000;
    return 0;
}

extern "C" int moray_threads(void) { return moray::pool_threads; }
