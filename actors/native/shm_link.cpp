#include "shm_link.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

namespace moray {
namespace {

// The control page and the arenas are written by another process: each word of them is read once.
uint64_t read_once(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

}  // namespace

Arrival peek(moray_link &link, uint8_t *packet, size_t size) {
    iovec piece = {packet, size};
    msghdr message = {};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    const ssize_t bytes = recvmsg(link.fd, &message, MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC);
    if (bytes < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return Arrival::NOTHING;
        link.error = errno;
        return Arrival::FAILED;
    }
    // MSG_CTRUNC: a file descriptor came with it, for which there was no room given.
    if (bytes != static_cast<ssize_t>(size) || message.msg_flags & MSG_CTRUNC) return Arrival::OTHER;
    return Arrival::PACKET;
}

Arrival wait(moray_link &link, uint8_t *packet, size_t bytes, int64_t until_ns) {
    Arrival found = peek(link, packet, bytes);
    if (found != Arrival::NOTHING) return found;
    Spin spin = {link.spin_rest, link.spin_next_rest};
    const int64_t began = now_ns(), spin_until = spin.begin(began);
    if (spin_until > began) {
        while (found == Arrival::NOTHING && now_ns() < spin_until) found = peek(link, packet, bytes);
        spin.ended(found != Arrival::NOTHING);
        if (found != Arrival::NOTHING) return found;
    }
    const int64_t left_ms = (until_ns - now_ns() + 999999) / 1000000;
    pollfd socket = {link.fd, POLLIN | POLLRDHUP, 0};
    if (poll(&socket, 1, left_ms > 0 ? static_cast<int>(left_ms) : 0) <= 0) return Arrival::NOTHING;
    found = peek(link, packet, bytes);
    return found == Arrival::NOTHING ? Arrival::OTHER : found;  // it hung up, or something is wrong: Python asks again
}

const uint8_t *incoming(const moray_link &link, uint64_t place, uint64_t payload_bytes) {
    if (place / SLOTS != link.arrived || link.arrived != link.received || !link.incoming) return nullptr;
    // The peer chose how large its slots are: where they are not aligned, neither are the tensors in them.
    if (link.incoming_slot_bytes < payload_bytes || link.incoming_slot_bytes % ALIGNMENT) return nullptr;
    return link.incoming + place % SLOTS * link.incoming_slot_bytes;
}

uint8_t *outgoing(moray_link &link, uint64_t bytes) {
    const uint64_t unreleased = link.sent - read_once(link.released_by_peer);
    if (unreleased >= SLOTS) return nullptr;  // all of them are in use, or the peer wrote nonsense
    if (!link.outgoing || link.outgoing_slot_bytes < bytes) return nullptr;
    uint32_t used = 0;
    for (uint64_t frame = link.sent - unreleased; frame != link.sent; frame++) used |= 1u << link.slots[frame % SLOTS];
    uint8_t slot = 0;
    while (used >> slot & 1) slot++;
    link.slots[link.sent % SLOTS] = slot;
    return link.outgoing + slot * link.outgoing_slot_bytes;
}

bool release_received(const moray_link &link) {
    __atomic_store_n(link.released_here, link.received, __ATOMIC_SEQ_CST);
    return !read_once(link.peer_waits);
}

bool take(moray_link &link, size_t bytes) {
    if (recv(link.fd, nullptr, 0, MSG_DONTWAIT | MSG_TRUNC) != static_cast<ssize_t>(bytes)) return false;
    link.received = ++link.arrived;
    return true;
}

bool send(moray_link &link, const uint8_t *packet, size_t bytes) {
    if (::send(link.fd, packet, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes)) {
        link.sent++;
        return true;
    }
    memcpy(link.packet, packet, bytes);
    link.packet_bytes = static_cast<int32_t>(bytes);
    return false;
}

}  // namespace moray
