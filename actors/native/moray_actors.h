// The C interface of the native half of routers and expert hosts: WORK frames of shm links are sent, served and answered with
// no interpreter in the way.
//
// What is ordinary is done here; everything else is left where it is, untouched, for the Python code that this mirrors
// (actors/links/shm.py, actors/links/wire.py, actors/moe_frames.py, actors/asking.py, actors/receiving.py,
// actors/expert_host.py): it decides, and words every error.
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
    MORAY_DONE = 4,    // all that was to be done is
    MORAY_UNSENT = 2,  // the reply in `packet` is still to be sent: the socket took it not, or failed
    MORAY_FAILED = 3,  // the socket failed with `error`
};

#define MORAY_PACKET_BYTES 128
#define MORAY_SLOTS 3  // of an arena: actors/links/shm_memory.py

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
    uint8_t slots[MORAY_SLOTS];  // where the last frames sent lie, and the next one will: frame n at n % MORAY_SLOTS
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

// moray_combine of kernels/cpu/native/moray_cpu.h.
typedef void (*moray_combine_function)(const uint16_t *const *outputs, const float *weights, int32_t tokens, int32_t top_k,
                                       int32_t width, float *out);

// One host, and what it is asked of one layer.
typedef struct {
    moray_link *link;    // NULL: there is none that native code can use
    uint64_t sequence;   // of the frame that asks
    int32_t begin, end;  // its pairs in `sorted`; none: it is not asked
    int32_t sent;        // whether it has been asked
    int32_t answered;    // whether its reply has come
    int64_t answer_ns;   // from its frame's sending to its reply
    int64_t sent_ns;
    uint8_t packet[MORAY_PACKET_BYTES];  // room
    const uint8_t *reply;                // once it has answered
} moray_asked;

// Where one layer's experts can be asked for.
typedef struct {
    const uint16_t *keys;   // [most, all_experts] host * width + slot of each expert's replicas; NULL: the caller asks for them
    const int64_t *count;   // [all_experts] replicas of each, those that come first in `keys`; at least 1 where one is wanted
    int32_t most;           // 1: there is nothing to choose
    int32_t all_experts, width, hosts;
} moray_routes;

// Which replica each pair goes to, given its expert, so that the hosts' pairs come out even. MORAY_DONE; MORAY_LEFT if an expert
// is none, or has no replica on one of the hosts.
int moray_choose_replicas(const int64_t *experts, int32_t pairs, const moray_routes *routes, int32_t *replicas);

// One layer's pairs on their way through the hosts, each of a token and one of its experts; [pairs] is [tokens, top_k]. The
// caller keeps everything where it is from the asking until the answers are there.
typedef struct {
    const uint16_t *hidden_states;  // [tokens, hidden] in bf16
    const int64_t *experts;         // [pairs]
    const float *weights;           // [pairs]
    int32_t tokens, hidden, top_k;
    int32_t layer;
    uint32_t epoch;
    moray_routes routes;
    int32_t spin_rest, spin_next_rest;  // of waits for all hosts
    uint64_t sequence;              // of the last frame that asked anybody
    moray_asked *asked;             // [hosts] of the routes
    int32_t *replicas;              // [pairs], room: which one each goes to
    uint64_t *sorted;               // [pairs], room: by key, then number: key << 32 | number
    int32_t *row_of_token;          // [tokens], room
    const uint16_t **outputs;       // [pairs], room
    moray_combine_function combine;
} moray_exchange;

// Ask the hosts for all pairs, as the routes say. MORAY_DONE, or MORAY_LEFT if that cannot be done, and then nobody is
// asked; but for sockets that take nothing, of hosts that are found not to be `sent` their frames.
int moray_ask_experts(moray_exchange *exchange);

// Once all hosts that were asked have answered: the sum of their outputs in top-k order, out [tokens, hidden], and every pair
// counted in load [all_experts]. MORAY_DONE; MORAY_QUIET if one has not within `microseconds`; MORAY_LEFT if something else has
// come. No reply is taken before all are there.
int moray_collect_experts(moray_exchange *exchange, int32_t microseconds, float *out, int64_t *load);

// Functions of kernels/cpu/native/moray_cpu.h: moray_attention, moray_swiglu, moray_add.
typedef void (*moray_attention_function)(const void *layer, const void *batch, uint16_t *hidden, uint16_t *cache,
                                         uint16_t *normed, int64_t *topk_ids, float *topk_weights);
typedef void (*moray_swiglu_function)(const uint16_t *x, int32_t tokens, const void *mlp, float *out);
typedef void (*moray_add_function)(uint16_t *hidden, const float *routed, const float *shared, int64_t elements);

// One layer of the model, as a router computes it.
typedef struct {
    const void *attention;  // moray_layer
    uint16_t *cache;
    const void *mlp;        // moray_mlp: shared expert or dense MLP; NULL: none
    int32_t number;
    int32_t routed;         // whether it has routed experts
    moray_routes routes;
    int64_t *load;          // of moray_collect_experts
} moray_run_layer;

// What a host has answered.
typedef struct {
    int64_t pairs, ns;
} moray_answered;

// Where a layer is.
enum { MORAY_ATTEND = 0, MORAY_SHARE = 1, MORAY_ASK = 2, MORAY_COLLECT = 3, MORAY_ADD = 4 };

// A batch on its way through the layers.
typedef struct {
    const moray_run_layer *layers;
    int32_t count;             // of `layers`, from the first one on, that the batch is to be through at the end
    int32_t layer, stage;      // what is to be done next
    int32_t asked;             // whether this layer's experts were asked for here, at least of one host; the caller, who goes
                               // on with what was left, sets it to 0
    const void *batch;         // moray_batch
    uint16_t *hidden, *normed; // [tokens, hidden] bf16: the residual, and room
    int64_t *experts;          // [tokens, top_k], room, as the next three
    float *weights;            // [tokens, top_k]
    float *shared, *routed;    // [tokens, hidden]
    moray_exchange *exchange;  // of these tokens and this room; layer and routes are set here
    int32_t wait_us;           // for the hosts of a layer
    int32_t leave_asking;      // whether all experts are for the caller to ask for
    int64_t waited_ns;         // in all
    int64_t last_wait_ns;      // for this layer
    moray_answered *answered;  // [layers, hosts] of what was collected here; else zeros
    moray_attention_function attention;
    moray_swiglu_function swiglu;
    moray_add_function add;
} moray_run;

// Take the batch on through its layers. MORAY_DONE after the last one; MORAY_LEFT where `stage` of `layer` is for the caller:
// to ask for experts, and to collect them and put their sum into `routed`. It goes on from the stage after that one.
int moray_run_layers(moray_run *run);

#ifdef __cplusplus
}
#endif
#endif
