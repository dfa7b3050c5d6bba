// Which replica computes which pair of a step: what actors/replica_choice.py defines, for hosts of equal speed. The same choice,
// since the same sums are done in the same order.
#include <algorithm>
#include <vector>

#include "moray_actors.h"

namespace {

constexpr int SWEEPS = 2;

// An expert with several replicas that somebody wants.
struct Shared {
    int32_t expert, replicas, wanted;
    int32_t quotas;   // where its replicas' quotas begin
    int32_t at, left;  // the replica whose quota is being used up, and what is left of it
};

// Kept from layer to layer, since it is needed for each.
struct Room {
    std::vector<int32_t> wanted;  // [experts]
    std::vector<Shared> shared;
    std::vector<int32_t> number;  // [experts] of those that are shared
    std::vector<Shared *> order;
    std::vector<int64_t> busy;    // [hosts] pairs
    std::vector<int32_t> quotas, hosts;  // of all replicas of shared experts
    std::vector<double> base, share;     // of one expert's replicas
    std::vector<int32_t> lowest;
};
thread_local Room room;

// Splits `amount` over vessels that hold `base` already, to one level where they get any.
void pour(double amount, const std::vector<double> &base, std::vector<int32_t> &lowest, std::vector<double> &share) {
    const int32_t count = static_cast<int32_t>(base.size());
    lowest.resize(count);
    for (int32_t i = 0; i < count; i++) {  // sorted as they come: there are few, and of equals the first stays first
        int32_t at = i;
        for (; at > 0 && base[lowest[at - 1]] > base[i]; at--) lowest[at] = lowest[at - 1];
        lowest[at] = i;
    }
    double level = 0.0, wide = 0.0, held = 0.0;
    for (int32_t i : lowest) {
        if (wide > 0.0 && base[i] >= level) break;
        held += base[i];
        wide += 1.0;
        level = (amount + held) / wide;
    }
    share.resize(count);
    for (int32_t i = 0; i < count; i++) share[i] = std::max(0.0, level - base[i]);
}

// Shares one expert's pairs out anew, given what all hosts have to do besides.
void share_out(const Shared &expert) {
    int32_t *quota = &room.quotas[expert.quotas];
    const int32_t *host = &room.hosts[expert.quotas];
    room.base.clear();
    for (int32_t r = 0; r < expert.replicas; r++) room.busy[host[r]] -= quota[r];
    for (int32_t r = 0; r < expert.replicas; r++) room.base.push_back(static_cast<double>(room.busy[host[r]]));
    pour(expert.wanted, room.base, room.lowest, room.share);
    int32_t left = expert.wanted;
    for (int32_t r = 0; r < expert.replicas; r++) left -= quota[r] = static_cast<int32_t>(room.share[r]);
    for (; left > 0; left--) {
        int32_t least = 0;
        for (int32_t r = 1; r < expert.replicas; r++)
            if (room.base[r] + quota[r] < room.base[least] + quota[least]) least = r;
        quota[least]++;
    }
    for (int32_t r = 0; r < expert.replicas; r++) room.busy[host[r]] += quota[r];
}

}  // namespace

extern "C" int moray_choose_replicas(const int64_t *experts, int32_t pairs, const moray_routes *routes, int32_t *replicas) {
    const int32_t all = routes->all_experts;
    room.wanted.assign(all, 0);
    for (int32_t p = 0; p < pairs; p++) {
        if (experts[p] < 0 || experts[p] >= all) return MORAY_LEFT;
        room.wanted[experts[p]]++;
    }
    room.busy.assign(routes->hosts, 0);
    room.shared.clear();
    room.quotas.clear();
    room.hosts.clear();
    room.number.resize(all);
    for (int32_t e = 0; e < all; e++) {
        if (!room.wanted[e]) continue;
        const int64_t count = routes->count[e];
        if (count < 1 || count > routes->most) return MORAY_LEFT;
        room.number[e] = static_cast<int32_t>(room.shared.size());
        const int32_t quotas = static_cast<int32_t>(room.hosts.size());
        if (count > 1) room.shared.push_back({e, static_cast<int32_t>(count), room.wanted[e], quotas, 0, 0});
        for (int64_t r = 0; r < count; r++) {
            const int32_t host = routes->keys[r * all + e] / routes->width;
            if (host >= routes->hosts) return MORAY_LEFT;
            if (count == 1)
                room.busy[host] += room.wanted[e];
            else
                room.hosts.push_back(host);
        }
    }
    room.quotas.assign(room.hosts.size(), 0);
    room.order.clear();
    for (Shared &expert : room.shared) room.order.push_back(&expert);
    std::sort(room.order.begin(), room.order.end(), [](const Shared *a, const Shared *b) {
        if (a->replicas != b->replicas) return a->replicas < b->replicas;
        return a->wanted != b->wanted ? a->wanted > b->wanted : a->expert < b->expert;
    });
    for (int sweep = 0; sweep < SWEEPS; sweep++)
        for (const Shared *expert : room.order) share_out(*expert);

    for (Shared &expert : room.shared) expert.left = room.quotas[expert.quotas];
    for (int32_t p = 0; p < pairs; p++) {
        const int64_t e = experts[p];
        replicas[p] = 0;
        if (routes->count[e] == 1) continue;
        Shared &expert = room.shared[room.number[e]];
        while (!expert.left) expert.left = room.quotas[expert.quotas + ++expert.at];
        expert.left--;
        replicas[p] = expert.at;
    }
    return MORAY_DONE;
}
