// One end of a shm link, as far as ordinary frames need it: what actors/links/shm.py does, without its waits for memory.
#ifndef MORAY_SHM_LINK_H
#define MORAY_SHM_LINK_H

#include <time.h>

#include "moray_actors.h"
#include "wire.h"

namespace moray {

inline int64_t now_ns() {
    timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

enum class Arrival { NOTHING, PACKET, OTHER, FAILED };  // OTHER: the end, or a packet of another length than PACKET

// Looks at the next packet without taking it; PACKET if it has exactly so many bytes, which are in `packet` then.
Arrival peek(moray_link &link, uint8_t *packet, size_t bytes);

// As `peek`, waiting until `until`: it looks again and again first if that has paid lately.
Arrival wait(moray_link &link, uint8_t *packet, size_t bytes, int64_t until_ns);

// Whether a wait should look again and again before it sleeps: as long as that pays. See actors/links/sockets.py.
struct Spin {
    int32_t &rest, &next_rest;
    int64_t begin(int64_t now) { return rest ? (rest--, now) : now + SPIN_NS; }  // until when
    void ended(bool answered) {
        if (!answered) rest = next_rest;
        next_rest = answered ? 1 : 2 * next_rest < LONGEST_REST ? 2 * next_rest : LONGEST_REST;
    }

    static constexpr int64_t SPIN_NS = 30 * 1000;
    static constexpr int32_t LONGEST_REST = 64;
};

// Where a frame of so many bytes lies whose packet was peeked at; NULL if that is for Python to say or to refuse.
const uint8_t *incoming(const moray_link &link, uint64_t place, uint64_t payload_bytes);

// Memory for the next frame of this end, at `next_place` from now on; NULL if it has to be waited for or made.
uint8_t *outgoing(moray_link &link, uint64_t bytes);

inline uint64_t next_place(const moray_link &link) { return link.sent * SLOTS + link.slots[link.sent % SLOTS]; }

// Tell the peer that frames received before are done with; false if it wants to hear of it by a packet. As soon as they are:
// the next frame then lies where they lay, which is in the caches of both.
bool release_received(const moray_link &link);

// Take the packet that was peeked at off the socket: its frame counts as received from now on.
bool take(moray_link &link, size_t bytes);

// Send a packet, which stands for a frame; else it is left in the link as unsent.
bool send(moray_link &link, const uint8_t *packet, size_t bytes);

}  // namespace moray
#endif
