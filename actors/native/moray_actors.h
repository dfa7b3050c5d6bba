// The C interface of the native half of an expert host: serving WORK frames of a shm link with no interpreter in the way.
//
// What is ordinary is done here; everything else is left where it is, untouched, for the Python code that this mirrors
// (actors/links/shm.py, actors/links/wire.py, actors/moe_frames.py, actors/expert_host.py): it decides, and words every error.
#ifndef MORAY_ACTORS_H
#define MORAY_ACTORS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How a call has ended.
enum {
    MORAY_QUIET = 0,   // no frame in time, or the time is over, or the table is superseded: call again
    MORAY_LEFT = 1,    // what comes next is not ordinary, and nothing of it has been taken
    MORAY_UNSENT = 2,  // the reply in `packet` is still to be sent: the socket took it not, or failed
    MORAY_FAILED = 3,  // the socket failed with `error`
};

#define MORAY_PACKET_BYTES 128

// One end of a link. Addresses and the file descriptor stay valid for the length of a call; the caller alone uses them.
typedef struct {
    int32_t fd;
    int32_t error;                      // errno, of MORAY_FAILED
    int32_t spin_rest, spin_next_rest;  // see actors/links/sockets.py: Spin
    uint64_t sent, received, arrived;   // frames so far
    uint64_t *released_here;            // the control page
    const uint64_t *peer_waits, *released_by_peer;
    const uint8_t *incoming;  // arenas, NULL where there is none yet; written by the peer at any time
    uint8_t *outgoing;
    uint64_t incoming_slot_bytes, outgoing_slot_bytes;
    int32_t packet_bytes;  // of MORAY_UNSENT
    uint8_t packet[MORAY_PACKET_BYTES];
} moray_link;

// moray_grouped_mlp of kernels/cpu/native/moray_cpu.h, whose address the caller knows.
typedef int (*moray_experts_function)(const uint16_t *hidden_states, int32_t tokens, const int32_t *rows,
                                      const int32_t *slots, int32_t pairs, const void *mlps, int32_t num_slots,
                                      uint16_t *out);

// The experts of one layer of one placement epoch.
typedef struct {
    uint32_t epoch;
    int32_t layer, hidden, num_slots;
    const void *mlps;
} moray_layer_experts;

// All that a host serves; valid for the length of a call. Whoever wants its memory back sets `superseded`.
typedef struct {
    const moray_layer_experts *layers;  // ascending by epoch, then layer
    int32_t count;
    int32_t superseded;
    moray_experts_function experts;
} moray_expert_table;

// A host's turn to compute: one computation at a time, whichever link asked for it.
typedef struct moray_turn moray_turn;
moray_turn *moray_turn_new(void);
void moray_turn_free(moray_turn *turn);
int moray_turn_take(moray_turn *turn, int32_t milliseconds);  // whether it was got in time
void moray_turn_give_back(moray_turn *turn);
// What calls of moray_serve_experts have computed: at any time, from any thread.
int64_t moray_turn_busy_ns(const moray_turn *turn);
int64_t moray_turn_pairs(const moray_turn *turn);
int64_t moray_turn_frames(const moray_turn *turn);

// Answer ordinary WORK frames for `milliseconds`, or until something else comes up. A socket that another thread shuts down
// ends it at once, a superseded table within 100 ms; neither interrupts a computation.
int moray_serve_experts(moray_link *link, const moray_expert_table *table, moray_turn *turn, int32_t milliseconds);

#ifdef __cplusplus
}
#endif
#endif
