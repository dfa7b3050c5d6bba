#include "wire.h"

#include <string.h>

namespace moray {
namespace {

constexpr uint32_t MAGIC = 0x59524F4D;
constexpr uint8_t VERSION = 2, FRAME = 1;
constexpr uint8_t BF16 = 2, INT32 = 5;  // codes of dtypes
constexpr uint8_t WORK = 1, DONE = 2;   // kinds of MoE frames
constexpr size_t HEAD = 32, BODY = 36, SPEC = 18, MOE_HEADER = 16;  // BODY: where it begins, after the checksum
static_assert(BODY + 2 * SPEC + MOE_HEADER == WORK_BYTES && BODY + SPEC + MOE_HEADER == DONE_BYTES, "");

// Little-endian whatever the machine, and at any address; compilers make one instruction of either.
template <typename Word>
Word get(const uint8_t *from) {
    Word word = 0;
    for (size_t i = 0; i < sizeof(Word); i++) word |= static_cast<Word>(static_cast<Word>(from[i]) << (8 * i));
    return word;
}

template <typename Word>
void put(uint8_t *to, Word word) {
    for (size_t i = 0; i < sizeof(Word); i++) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

// zlib's crc32, four bits at a time: its table is one cache line, and nothing is warm here after a layer's weights.
uint32_t crc32(uint32_t crc, const uint8_t *data, size_t bytes) {
    static constexpr uint32_t TABLE[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    crc = ~crc;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= data[i];
        crc = (crc >> 4) ^ TABLE[crc & 15];
        crc = (crc >> 4) ^ TABLE[crc & 15];
    }
    return ~crc;
}

uint32_t checksum(const uint8_t *packet, size_t bytes) {
    return crc32(crc32(0, packet, HEAD), packet + BODY, bytes - BODY);
}

void put_head(uint8_t *packet, uint16_t tensors, size_t bytes, uint64_t place, uint64_t payload_bytes) {
    put<uint32_t>(packet, MAGIC);
    packet[4] = VERSION;
    packet[5] = FRAME;
    put<uint16_t>(packet + 6, tensors);
    put<uint32_t>(packet + 8, MOE_HEADER);
    put<uint32_t>(packet + 12, static_cast<uint32_t>(bytes - BODY));
    put<uint64_t>(packet + 16, place);
    put<uint64_t>(packet + 24, payload_bytes);
}

void put_spec(uint8_t *to, uint8_t dtype, uint64_t rows, uint64_t columns) {
    to[0] = dtype;
    to[1] = 2;
    put<uint64_t>(to + 2, rows);
    put<uint64_t>(to + 10, columns);
}

void put_moe_header(uint8_t *to, uint8_t kind, const Work &work) {
    to[0] = kind;
    to[1] = 0;
    put<uint16_t>(to + 2, work.layer);
    put<uint32_t>(to + 4, work.epoch);
    put<uint64_t>(to + 8, work.sequence);
}

}  // namespace

bool lay_out(Work &work) {
    // Each by itself first: products of what is left do not overflow.
    constexpr uint64_t MOST = MAX_PAYLOAD_BYTES;
    if (!work.tokens || work.tokens > MOST || !work.hidden || work.hidden > MOST || !work.pairs || work.pairs > MOST)
        return false;
    if (work.tokens * work.hidden > MOST / 2 || work.pairs * work.hidden > MOST / 2) return false;  // in bf16 each
    work.pairs_offset = (2 * work.tokens * work.hidden + ALIGNMENT - 1) & -ALIGNMENT;
    work.payload_bytes = work.pairs_offset + 8 * work.pairs;
    return work.payload_bytes <= MOST;
}

bool decode_work(const uint8_t *packet, Work &work) {
    work.place = place_in(packet);
    work.payload_bytes = get<uint64_t>(packet + 24);
    work.tokens = get<uint64_t>(packet + BODY + 2);
    work.hidden = get<uint64_t>(packet + BODY + 10);
    work.pairs = get<uint64_t>(packet + BODY + SPEC + 10);
    // What a frame may be otherwise is compared as a whole: an ordinary one has no other bytes in these places.
    uint8_t expected[HEAD + 2 * SPEC];
    put_head(expected, 2, WORK_BYTES, work.place, work.payload_bytes);
    put_spec(expected + HEAD, BF16, work.tokens, work.hidden);
    put_spec(expected + HEAD + SPEC, INT32, 2, work.pairs);
    if (memcmp(packet, expected, HEAD) || memcmp(packet + BODY, expected + HEAD, 2 * SPEC)) return false;
    if (get<uint32_t>(packet + HEAD) != checksum(packet, WORK_BYTES)) return false;
    const uint64_t payload_bytes = work.payload_bytes;
    if (!lay_out(work) || work.payload_bytes != payload_bytes) return false;
    const uint8_t *header = packet + BODY + 2 * SPEC;
    if (header[0] != WORK) return false;
    work.layer = get<uint16_t>(header + 2);
    work.epoch = get<uint32_t>(header + 4);
    work.sequence = get<uint64_t>(header + 8);
    return true;
}

void encode_work(const Work &work, uint8_t *packet) {
    put_head(packet, 2, WORK_BYTES, work.place, work.payload_bytes);
    put_spec(packet + BODY, BF16, work.tokens, work.hidden);
    put_spec(packet + BODY + SPEC, INT32, 2, work.pairs);
    put_moe_header(packet + BODY + 2 * SPEC, WORK, work);
    put<uint32_t>(packet + HEAD, checksum(packet, WORK_BYTES));
}

uint64_t place_in(const uint8_t *packet) { return get<uint64_t>(packet + 16); }

void encode_done(const Work &work, uint64_t place, uint8_t *packet) {
    put_head(packet, 1, DONE_BYTES, place, 2 * work.pairs * work.hidden);
    put_spec(packet + BODY, BF16, work.pairs, work.hidden);
    put_moe_header(packet + BODY + SPEC, DONE, work);
    put<uint32_t>(packet + HEAD, checksum(packet, DONE_BYTES));
}

}  // namespace moray
