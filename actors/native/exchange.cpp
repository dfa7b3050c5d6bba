// A router's half: one layer's pairs to every host that has some of their experts, and the sum of what comes back.
#include <poll.h>
#include <string.h>

#include <algorithm>
#include <utility>

#include "shm_link.h"

namespace moray {
namespace {

constexpr int MOST_HOSTS = 256;  // that one wait is for; with more, Python waits

int32_t pair_of(uint64_t sorted) { return static_cast<int32_t>(sorted); }
int32_t key_of(uint64_t sorted) { return static_cast<int32_t>(sorted >> 32); }

// Pairs by host, then slot, then number, so that a slot's tokens ascend; false if a key is none of the hosts'.
bool sort_pairs(moray_exchange &x) {
    const int32_t pairs = x.tokens * x.top_k;
    const moray_routes &routes = x.routes;
    const bool several = routes.most > 1;
    if (several && moray_choose_replicas(x.experts, pairs, &routes, x.replicas) != MORAY_DONE) return false;
    const auto key = [&](int32_t p) {
        return routes.keys[(several ? x.replicas[p] : 0) * routes.all_experts + x.experts[p]];
    };
    // Counted instead of compared, which takes ten times as long for 512 pairs: nothing of it can be predicted.
    int32_t ends[1 << 16];  // of each key's pairs; at first of those before
    const int64_t keys = int64_t{routes.hosts} * routes.width;
    if (keys > 1 << 16) return false;
    std::fill_n(ends, keys, 0);
    for (int32_t p = 0; p < pairs; p++) {
        if (x.experts[p] < 0 || x.experts[p] >= routes.all_experts || key(p) >= keys) return false;
        ends[key(p)]++;
    }
    int32_t before = 0;
    for (int64_t k = 0; k < keys; k++) before += std::exchange(ends[k], before);
    for (int32_t p = 0; p < pairs; p++)
        x.sorted[ends[key(p)]++] = static_cast<uint64_t>(key(p)) << 32 | static_cast<uint32_t>(p);
    int32_t at = 0;
    for (int32_t h = 0; h < routes.hosts; h++) {
        x.asked[h].begin = at;
        x.asked[h].end = at = ends[(h + 1) * int64_t{routes.width} - 1];
    }
    return true;
}

// Numbers the tokens that a host is asked for by the order in which they are sent; how many there are. -1 for the others.
uint64_t number_tokens(moray_exchange &x, const moray_asked &host) {
    std::fill_n(x.row_of_token, x.tokens, -1);
    for (int32_t i = host.begin; i < host.end; i++) x.row_of_token[pair_of(x.sorted[i]) / x.top_k] = 0;
    int32_t rows = 0;
    for (int32_t t = 0; t < x.tokens; t++)
        if (!x.row_of_token[t]) x.row_of_token[t] = rows++;
    return static_cast<uint64_t>(rows);
}

Work work_of(const moray_exchange &x, const moray_asked &host) {
    Work work = {};
    work.hidden = static_cast<uint64_t>(x.hidden);
    work.pairs = static_cast<uint64_t>(host.end - host.begin);
    work.layer = static_cast<uint16_t>(x.layer);
    work.epoch = x.epoch;
    work.sequence = host.sequence;
    return work;
}

// Writes a host's frame where the host will read it; false if there is no room for it.
bool write(moray_exchange &x, moray_asked &host, int32_t slot_0) {
    Work work = work_of(x, host);
    work.tokens = number_tokens(x, host);
    uint8_t *request = lay_out(work) ? outgoing(*host.link, work.payload_bytes) : nullptr;
    if (!request) return false;
    work.place = next_place(*host.link);
    encode_work(work, host.packet);
    const int64_t width = x.hidden;
    for (int32_t t = 0; t < x.tokens; t++)
        if (x.row_of_token[t] >= 0)
            memcpy(request + 2 * width * x.row_of_token[t], x.hidden_states + width * t, 2 * work.hidden);
    int32_t *rows = reinterpret_cast<int32_t *>(request + work.pairs_offset), *slots = rows + work.pairs;
    for (int32_t i = host.begin; i < host.end; i++, rows++, slots++) {
        *rows = x.row_of_token[pair_of(x.sorted[i]) / x.top_k];
        *slots = key_of(x.sorted[i]) - slot_0;
    }
    return true;
}

bool is_asked(const moray_asked &host) { return host.begin < host.end; }

enum class Reply { NONE, GOOD, OTHER };

// Whether the reply to what a host was asked for is there: the one packet that it can be.
Reply look(const moray_exchange &x, moray_asked &host) {
    uint8_t packet[DONE_BYTES], expected[DONE_BYTES];
    switch (peek(*host.link, packet, DONE_BYTES)) {
        case Arrival::NOTHING: return Reply::NONE;
        case Arrival::OTHER: case Arrival::FAILED: return Reply::OTHER;
        case Arrival::PACKET: break;
    }
    const Work work = work_of(x, host);
    const uint64_t place = place_in(packet);
    encode_done(work, place, expected);
    host.reply = incoming(*host.link, place, 2 * work.pairs * work.hidden);
    if (memcmp(packet, expected, DONE_BYTES) || !host.reply) return Reply::OTHER;
    host.answered = 1;
    host.answer_ns = now_ns() - host.sent_ns;
    return Reply::GOOD;
}

// Looks at all hosts that have not answered; how many are left, or -1 if one said something else.
int look_at_all(moray_exchange &x) {
    int left = 0;
    for (int32_t h = 0; h < x.routes.hosts; h++) {
        moray_asked &host = x.asked[h];
        if (!is_asked(host) || host.answered) continue;
        switch (look(x, host)) {
            case Reply::OTHER: return -1;
            case Reply::NONE: left++; break;
            case Reply::GOOD: break;
        }
    }
    return left;
}

// Sleeps until one of the hosts that are left says something, or it is `until_ns`.
void sleep(const moray_exchange &x, int64_t until_ns) {
    pollfd sockets[MOST_HOSTS];
    nfds_t count = 0;
    for (int32_t h = 0; h < x.routes.hosts; h++)
        if (is_asked(x.asked[h]) && !x.asked[h].answered) sockets[count++] = {x.asked[h].link->fd, POLLIN | POLLRDHUP, 0};
    const int64_t left_ns = std::max<int64_t>(0, until_ns - now_ns());
    const timespec limit = {left_ns / 1000000000, left_ns % 1000000000};
    ppoll(sockets, count, &limit, nullptr);
}

int wait_for_all(moray_exchange &x, int64_t until_ns) {
    int left = look_at_all(x);
    if (left <= 0) return left;
    Spin spin = {x.spin_rest, x.spin_next_rest};
    const int64_t began = now_ns(), spin_until = spin.begin(began);
    if (spin_until > began) {
        while (left > 0 && now_ns() < spin_until) left = look_at_all(x);
        spin.ended(left <= 0);
    }
    while (left > 0 && now_ns() < until_ns) {
        sleep(x, until_ns);
        left = look_at_all(x);
    }
    return left;
}

}  // namespace
}  // namespace moray

extern "C" {

int moray_ask_experts(moray_exchange *exchange) {
    using namespace moray;
    moray_exchange &x = *exchange;
    for (int32_t h = 0; h < x.routes.hosts; h++) {
        moray_asked &host = x.asked[h];
        host.begin = host.end = host.sent = host.answered = 0;
    }
    if (x.routes.hosts > MOST_HOSTS || x.tokens <= 0) return MORAY_LEFT;
    if (!sort_pairs(x)) {
        for (int32_t h = 0; h < x.routes.hosts; h++) x.asked[h].begin = x.asked[h].end = 0;
        return MORAY_LEFT;
    }
    for (int32_t h = 0; h < x.routes.hosts; h++) {
        moray_asked &host = x.asked[h];
        if (!is_asked(host)) continue;
        host.sequence = ++x.sequence;
        if (!host.link || !write(x, host, h * x.routes.width)) return MORAY_LEFT;
    }
    // Not each as soon as its frame is written: the last one decides when all have answered, and it is told no sooner so. On two
    // cores it was often put behind the first one, which had begun to compute on the other core, and waited for it to end.
    bool all = true;
    for (int32_t h = 0; h < x.routes.hosts; h++) {
        moray_asked &host = x.asked[h];
        if (!is_asked(host)) continue;
        host.sent_ns = now_ns();
        host.sent = send(*host.link, host.packet, WORK_BYTES);
        all = all && host.sent;
    }
    return all ? MORAY_DONE : MORAY_LEFT;
}

int moray_collect_experts(moray_exchange *exchange, int32_t microseconds, float *out, int64_t *load) {
    using namespace moray;
    moray_exchange &x = *exchange;
    for (int32_t h = 0; h < x.routes.hosts; h++)
        if (is_asked(x.asked[h]) && !(x.asked[h].link && release_received(*x.asked[h].link))) return MORAY_LEFT;
    const int left = wait_for_all(x, now_ns() + microseconds * 1000LL);
    if (left) return left < 0 ? MORAY_LEFT : MORAY_QUIET;

    for (int32_t h = 0; h < x.routes.hosts; h++) {
        const moray_asked &host = x.asked[h];
        if (!is_asked(host)) continue;
        const uint8_t *reply = host.reply;
        for (int32_t i = host.begin; i < host.end; i++, reply += 2 * x.hidden)
            x.outputs[pair_of(x.sorted[i])] = reinterpret_cast<const uint16_t *>(reply);
    }
    x.combine(x.outputs, x.weights, x.tokens, x.top_k, x.hidden, out);
    for (int32_t h = 0; h < x.routes.hosts; h++) {
        if (!is_asked(x.asked[h])) continue;
        // A socket that gives its packet no more is one that was shut down meanwhile, and the next operation will say so. So it
        // is with a host that wants to hear of the release: the next collection will find that.
        take(*x.asked[h].link, DONE_BYTES);
        release_received(*x.asked[h].link);
    }
    for (int32_t p = 0; p < x.tokens * x.top_k; p++)
        __atomic_store_n(&load[x.experts[p]], load[x.experts[p]] + 1, __ATOMIC_RELAXED);
    return MORAY_DONE;
}

}  // extern "C"
