// The loop itself: an ordinary request is looked at, computed and answered; whatever it is not, stays where it lies.
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <new>

#include "shm_link.h"

struct moray_turn {
    std::timed_mutex mutex;
    int64_t busy_ns = 0, pairs = 0, frames = 0;  // written by whoever has the turn
};

namespace moray {
namespace {

constexpr int64_t LOOK_ROUND_NS = 100 * 1000 * 1000;  // how long a superseded table may go unnoticed

void add(int64_t &total, int64_t more) {
    __atomic_store_n(&total, __atomic_load_n(&total, __ATOMIC_RELAXED) + more, __ATOMIC_RELAXED);
}

const moray_layer_experts *find(const moray_expert_table &table, uint32_t epoch, int32_t layer) {
    const moray_layer_experts *end = table.layers + table.count;
    const moray_layer_experts *found =
        std::lower_bound(table.layers, end, 0, [&](const moray_layer_experts &one, int) {
            return one.epoch != epoch ? one.epoch < epoch : one.layer < layer;
        });
    return found != end && found->epoch == epoch && found->layer == layer ? found : nullptr;
}

// The pairs of a frame in memory of this process: the peer can change its own while they are checked and followed.
class Pairs {
public:
    ~Pairs() { free(memory); }

    // rows [count] and, behind them, slots [count]; NULL if there is no memory.
    const int32_t *copy(const uint8_t *from, size_t count) {
        if (room < count) {
            void *larger = realloc(memory, 8 * count);
            if (!larger) return nullptr;
            memory = static_cast<int32_t *>(larger);
            room = count;
        }
        std::copy_n(from, 8 * count, reinterpret_cast<uint8_t *>(memory));
        return memory;
    }

private:
    int32_t *memory = nullptr;
    size_t room = 0;
};

bool are_ordinary(const int32_t *rows, const int32_t *slots, int32_t count, int32_t tokens, int32_t num_slots) {
    for (int32_t p = 0; p < count; p++) {
        if (rows[p] < 0 || rows[p] >= tokens || slots[p] < 0 || slots[p] >= num_slots) return false;
        if (p && slots[p] < slots[p - 1]) return false;
    }
    return true;
}

enum class Did { ANSWERED, NOTHING, LEFT, UNSENT };

// Answers the request that `packet` announces, and takes it only when its result is there: what cannot be done is left whole.
Did answer(moray_link &link, const moray_expert_table &table, moray_turn &turn, const uint8_t *packet, int64_t until_ns) {
    static thread_local Pairs memory;
    Work work;
    if (!decode_work(packet, work)) return Did::LEFT;
    const moray_layer_experts *experts = find(table, work.epoch, work.layer);
    if (!experts || experts->hidden < 0 || static_cast<uint64_t>(experts->hidden) != work.hidden) return Did::LEFT;
    const uint8_t *request = incoming(link, work.place, work.payload_bytes);
    uint8_t *reply = outgoing(link, 2 * work.pairs * work.hidden);
    if (!request || !reply || !release_received(link)) return Did::LEFT;

    const int32_t tokens = static_cast<int32_t>(work.tokens), count = static_cast<int32_t>(work.pairs);
    const int32_t *rows = memory.copy(request + work.pairs_offset, work.pairs);
    if (!rows || !are_ordinary(rows, rows + count, count, tokens, experts->num_slots)) return Did::LEFT;

    const auto patience = std::chrono::nanoseconds(std::max<int64_t>(0, until_ns - now_ns()));
    if (!turn.mutex.try_lock() && !turn.mutex.try_lock_for(patience)) return Did::NOTHING;
    const int64_t began = now_ns();
    const int failed = table.experts(reinterpret_cast<const uint16_t *>(request), tokens, rows, rows + count, count,
                                     experts->mlps, experts->num_slots, reinterpret_cast<uint16_t *>(reply));
    add(turn.busy_ns, now_ns() - began);
    add(turn.pairs, failed ? 0 : count);
    add(turn.frames, failed ? 0 : 1);
    turn.mutex.unlock();
    if (failed || !take(link, WORK_BYTES)) return Did::LEFT;
    release_received(link);  // before the router hears of the reply; if it wants to hear of this, the next request is LEFT

    uint8_t done[DONE_BYTES];
    encode_done(work, next_place(link), done);
    return send(link, done, DONE_BYTES) ? Did::ANSWERED : Did::UNSENT;
}

}  // namespace
}  // namespace moray

extern "C" {

moray_turn *moray_turn_new(void) { return new (std::nothrow) moray_turn; }

void moray_turn_free(moray_turn *turn) { delete turn; }

int moray_turn_take(moray_turn *turn, int32_t milliseconds) {
    return turn->mutex.try_lock_for(std::chrono::milliseconds(milliseconds));
}

void moray_turn_give_back(moray_turn *turn) { turn->mutex.unlock(); }

int64_t moray_turn_busy_ns(const moray_turn *turn) { return __atomic_load_n(&turn->busy_ns, __ATOMIC_RELAXED); }

int64_t moray_turn_pairs(const moray_turn *turn) { return __atomic_load_n(&turn->pairs, __ATOMIC_RELAXED); }

int64_t moray_turn_frames(const moray_turn *turn) { return __atomic_load_n(&turn->frames, __ATOMIC_RELAXED); }

int moray_serve_experts(moray_link *link, const moray_expert_table *table, moray_turn *turn, int32_t milliseconds) {
    using namespace moray;
    uint8_t packet[WORK_BYTES];
    const int64_t until = now_ns() + milliseconds * 1000000LL;
    const auto superseded = [&] { return __atomic_load_n(&table->superseded, __ATOMIC_ACQUIRE) != 0; };
    for (;;) {
        const int64_t now = now_ns();
        if (now >= until || superseded()) return MORAY_QUIET;
        const int64_t look = std::min(until, now + LOOK_ROUND_NS);
        switch (wait(*link, packet, WORK_BYTES, look)) {
            case Arrival::NOTHING: continue;
            case Arrival::OTHER: return MORAY_LEFT;
            case Arrival::FAILED: return MORAY_FAILED;
            case Arrival::PACKET: break;
        }
        if (superseded()) return MORAY_QUIET;  // while it waited: this request may be for what is new
        switch (answer(*link, *table, *turn, packet, look)) {
            case Did::ANSWERED: case Did::NOTHING: break;
            case Did::LEFT: return MORAY_LEFT;
            case Did::UNSENT: return MORAY_UNSENT;
        }
    }
}

}  // extern "C"
