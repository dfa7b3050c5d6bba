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

// Looks at the next packet without taking it; PACKET if it has exactly WORK_BYTES, which are in `packet` then.
Arrival peek(moray_link &link, uint8_t *packet);

// As `peek`, waiting until `until`: it looks again and again first if that has paid lately.
Arrival wait(moray_link &link, uint8_t *packet, int64_t until_ns);

// Where the frame of a packet that was peeked at lies; NULL if that is for Python to say or to refuse.
const uint8_t *incoming(const moray_link &link, const Work &work);

// Memory for the next frame of this end; NULL if it has to be waited for or made.
uint8_t *outgoing(const moray_link &link, uint64_t bytes);

// Tell the peer that frames received before are done with; false if it wants to hear of it by a packet.
bool release_received(const moray_link &link);

// Take the packet that was peeked at off the socket: its frame counts as received from now on.
bool take(moray_link &link);

// Send a packet, which stands for a frame; else it is left in the link as unsent.
bool send(moray_link &link, const uint8_t *packet, size_t bytes);

}  // namespace moray
#endif
