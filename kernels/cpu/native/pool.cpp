#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "moray_cpu.h"

namespace moray {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int STAGE_SPINS = 2000;  // the last pieces of a stage end within microseconds, or a core is missing
constexpr int PARTS = 4;           // of its share of what is left, a thread takes a quarter at a time; 1.2 times as fast as
                                   // piece by piece for one token's experts on Zen 5
constexpr int32_t OPEN = 1 << 30;

std::atomic<uint32_t> started{0};   // counts regions; workers sleep on it
std::atomic<int32_t> inside{0};     // workers in the region, and OPEN while more may enter; the caller sleeps on it
std::atomic<int32_t> asleep{0};     // workers that sleep
std::atomic<int32_t> waiting{0};    // threads that sleep until a stage is done
std::atomic<int32_t> caller_sleeps{0};
std::atomic<int32_t> spin_ns{0};
std::atomic<int> pool_threads{1};  // what calls use

pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;  // whoever has it runs a region; guards the rest
int made = 0;                                           // workers that exist
pid_t made_by = 0;
Task region_task;
void *region_argument;
int region_workers = 0;  // how many of them may enter
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

// While there, this thread computes with numbers below the normal ones as with any others. Libraries built with -ffast-math have
// the thread that loads them take such numbers for zero, torch does when asked to, and threads inherit it: codes of e4m3 would
// be among them, and the bits of a result would depend on the thread.
class WithSubnormals {
#if defined(__x86_64__)
    static constexpr unsigned FLUSHING = 0x8040;  // of results, and of operands
    const unsigned was = __builtin_ia32_stmxcsr();

public:
    WithSubnormals() {
        if (was & FLUSHING) __builtin_ia32_ldmxcsr(was & ~FLUSHING);
    }
    ~WithSubnormals() {
        if (was & FLUSHING) __builtin_ia32_ldmxcsr(was);
    }
#endif
};

void *work(void *number) {
    const WithSubnormals always;
    const int worker = static_cast<int>(reinterpret_cast<intptr_t>(number));
    in_region = true;
    uint32_t seen = started.load();
    for (;;) {
        const int64_t until = now_ns() + spin_ns.load(std::memory_order_relaxed);
        while (started.load(std::memory_order_acquire) == seen && now_ns() < until) {
            for (int i = 0; i < 20; i++) pause_cpu();
            sched_yield();  // another process may need this core: it goes first
        }
        while (started.load() == seen) {
            asleep.fetch_add(1);
            sleep_on(started, seen);
            asleep.fetch_sub(1);
        }
        seen = started.load();
        int32_t there = inside.load();
        while (there & OPEN && !inside.compare_exchange_weak(there, there + 1)) {
        }
        if (!(there & OPEN)) continue;  // too late
        if (worker < region_workers) region_task(region_argument);
        if (inside.fetch_sub(1) == 1 && caller_sleeps.load()) wake(inside, 1);
    }
    return nullptr;
}

// Makes the workers that are missing; with the lock held. How many there are then, at most as many as are wanted.
int ready_workers() {
    if (made_by != getpid()) {  // after a fork there are none
        made = 0;
        made_by = getpid();
        inside = asleep = waiting = caller_sleeps = 0;
    }
    const int wanted = pool_threads - 1;
    while (made < wanted) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        const int failed = pthread_create(&thread, &attributes, work, reinterpret_cast<void *>(static_cast<intptr_t>(made)));
        pthread_attr_destroy(&attributes);
        if (failed) break;
        made++;
    }
    return made < wanted ? made : wanted;
}

}  // namespace

void run(Task task, void *argument) {
    const WithSubnormals here;
    if (in_region || pthread_mutex_trylock(&pool_lock) != 0) return task(argument);
    const int workers = ready_workers();
    in_region = true;
    if (workers == 0) {
        task(argument);
    } else {
        region_task = task;
        region_argument = argument;
        region_workers = workers;
        inside = OPEN;
        started.fetch_add(1);
        if (asleep.load()) wake(started, MAX_THREADS);
        task(argument);
        inside.fetch_and(~OPEN);
        for (int i = 0; i < STAGE_SPINS && inside.load(std::memory_order_acquire); i++) pause_cpu();
        while (int32_t left = inside.load()) {
            caller_sleeps = 1;
            sleep_on(inside, left);
            caller_sleeps = 0;
        }
    }
    in_region = false;
    pthread_mutex_unlock(&pool_lock);
}

int32_t take(Stage &stage, int32_t pieces, int32_t &count) {
    int32_t taken = __atomic_load_n(&stage.taken, __ATOMIC_RELAXED);
    do {
        const int32_t left = pieces - taken, share = left / (PARTS * pool_threads.load(std::memory_order_relaxed));
        count = left <= 0 ? 0 : share > 1 ? share : 1;
    } while (count && !__atomic_compare_exchange_n(&stage.taken, &taken, taken + count, true, __ATOMIC_RELAXED,
                                                   __ATOMIC_RELAXED));
    return taken;
}

void did(Stage &stage, int32_t pieces, int32_t count) {
    if (__atomic_add_fetch(&stage.done, count, __ATOMIC_SEQ_CST) == pieces && waiting.load())
        syscall(SYS_futex, &stage.done, FUTEX_WAKE_PRIVATE, MAX_THREADS, nullptr, nullptr, 0);
}

void wait_for(Stage &stage, int32_t pieces, Ahead ahead) {
    for (int i = 0; i < STAGE_SPINS; i++) {
        if (__atomic_load_n(&stage.done, __ATOMIC_ACQUIRE) >= pieces) return;
        if (ahead.lines) {
            for (int32_t byte = 0; byte < ahead.width; byte += 64) __builtin_prefetch(ahead.at + byte, 0, 2);
            ahead.at += ahead.step;
            ahead.lines--;
        } else {
            pause_cpu();
        }
    }
    waiting.fetch_add(1);
    for (int32_t done; (done = __atomic_load_n(&stage.done, __ATOMIC_SEQ_CST)) < pieces;) {
        timespec limit = {0, 100 * 1000 * 1000};
        syscall(SYS_futex, &stage.done, FUTEX_WAIT_PRIVATE, done, &limit, nullptr, 0);
    }
    waiting.fetch_sub(1);
}

namespace {
struct Arena {
    void *memory[PIECES] = {};
    size_t bytes[PIECES] = {};
    ~Arena() {
        for (void *piece : memory) free(piece);
    }
};
thread_local Arena arena;

// What lies between the stages of a step is walked through in strides of many KB. In pages of 4 KB, attention of 4 prompts of
// 128 tokens took 1.03 times as long (Zen 5).
constexpr size_t HUGE_PAGE = 2 << 20;
}  // namespace

void *scratch(int which, size_t bytes) {
    if (arena.bytes[which] < bytes) {
        free(arena.memory[which]);
        bytes += bytes / 2;
        const bool large = bytes >= HUGE_PAGE;
        // As any other failed allocation of a few MB.
        if (posix_memalign(&arena.memory[which], large ? HUGE_PAGE : 64, bytes)) abort();
        if (large) madvise(arena.memory[which], bytes, MADV_HUGEPAGE);
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
