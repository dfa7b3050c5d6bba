// The two packets of an ordinary exchange, byte for byte as actors/links/wire.py and actors/moe_frames.py have them:
//
//     WORK   head, specs of hidden_states bf16 [T, H] and pairs int32 [2, P], MoE header     88 bytes
//     DONE   head, spec of outputs bf16 [P, H], MoE header                                   70 bytes
#ifndef MORAY_WIRE_H
#define MORAY_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "moray_actors.h"

namespace moray {

constexpr uint64_t SLOTS = MORAY_SLOTS;
constexpr uint64_t ALIGNMENT = 64;  // wire.py, as the next one
constexpr uint64_t MAX_PAYLOAD_BYTES = 1 << 30;
constexpr size_t WORK_BYTES = 88, DONE_BYTES = 70;

struct Work {
    uint64_t place;  // number on the link * SLOTS + slot of the arena
    uint64_t tokens, hidden, pairs;  // each at least 1, none large enough for a product of two and 8 to overflow
    uint64_t pairs_offset, payload_bytes;
    uint16_t layer;
    uint32_t epoch;
    uint64_t sequence;
};

// Whether the bytes are an ordinary request, in every length consistent with itself; `packet` has WORK_BYTES.
bool decode_work(const uint8_t *packet, Work &work);

// Finds the request's offsets and its bytes; false if it is too large for one frame, or nothing.
bool lay_out(Work &work);

// The request itself, once it is laid out; `packet` has room for WORK_BYTES.
void encode_work(const Work &work, uint8_t *packet);

// Where the frame lies that a packet of at least DONE_BYTES stands for, if it is one.
uint64_t place_in(const uint8_t *packet);

// The reply to `work` at `place` of the other direction; `packet` has room for DONE_BYTES.
void encode_done(const Work &work, uint64_t place, uint8_t *packet);

}  // namespace moray
#endif
