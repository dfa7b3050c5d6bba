// The C interface of Moray's CPU kernels. Plain structs over pointers; nothing here knows of torch or Python.
//
// Every row of every result has the same bits whatever the batch, the number of threads and the order in which they come:
// each output is one sum in one fixed order (gemm.h), and work is divided along outputs alone.
#ifndef MORAY_CPU_H
#define MORAY_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef uint16_t moray_bf16;

enum { MORAY_E4M3 = 0, MORAY_BF16 = 1, MORAY_F32 = 2 };   // kinds of elements

// A matrix [rows, cols] that rows of activations are multiplied with (transposed), packed by moray_pack. 64 bytes hold a few
// columns of a tile of 16 rows: 4 of e4m3, 2 of bf16, 1 of fp32. Four tiles (the last ones: fewer) are a group: the first such
// columns of each of them, the next ones of each, and so on, to be read from the first byte to the last. Groups lie one after
// the other.
enum { MORAY_TILE = 16, MORAY_GROUP = 4 };
typedef struct {
    const void *data;
    const float *scales;  // [ceil(rows / 128), ceil(cols / 128)] of e4m3; NULL for the others
    int32_t rows, cols;   // rows: any, the last tile is filled with zeros; cols: a multiple of 4
    int32_t kind;
    int32_t reserved;
} moray_matrix;

// A SwiGLU MLP: gate_up [2 N, H], gate rows first, N a multiple of 16; down [H, N]. `gate_up.data` is NULL for an empty slot.
typedef struct {
    moray_matrix gate_up, down;
} moray_mlp;

// The attention half of one layer, and its gate.
typedef struct {
    int32_t hidden, heads, nope, rope, value, q_rank /* 0: queries are not compressed */, kv_rank;
    int32_t experts /* 0: no gate */, top_k, groups, kept_groups, softmax /* else sigmoid */, normalise;
    float eps, softmax_scale, routed_scale;
    const moray_bf16 *attention_norm, *q_norm, *kv_norm, *feed_forward_norm;
    moray_matrix q_a, q_b, kv_a, o, gate;
    const float *gate_bias;         // [experts] or NULL
    const moray_matrix *key_up;     // [heads] of [kv_rank, nope]
    const moray_matrix *value_up;   // [heads] of [value, kv_rank]
} moray_layer;

// Where the tokens of a step stand.
typedef struct {
    int32_t tokens, segments, page_size, row;  // row: elements of a cached row, kv_rank + rope
    const int32_t *segment;     // [segments, 4]: first token, tokens, position of the first, first page in `tables`
    const int32_t *tables;      // page numbers of all segments
    const int64_t *cache_rows;  // [tokens] page * page_size + offset
    const float *rotation;      // [tokens, rope / 2, 2] cosine and sine
} moray_batch;

// How one row of logits is sampled, see kernels/sampling.py; all zeros: greedily.
typedef struct {
    double temperature;  // 0, or from 1e-100 to 1e100
    int64_t top_k;       // 0, and from the vocabulary's size on: no such filter
    double top_p, min_p;  // 1 and 0: no such filter
    int64_t noise_key;   // 32 bits
} moray_sampling;

// Instruction sets, best first; moray_cpu_best gives the best that this machine has.
enum { MORAY_AMX = 5, MORAY_AVX512_BF16 = 4, MORAY_AVX512 = 3, MORAY_AVX2 = 2, MORAY_GENERIC = 1 };
int moray_cpu_best(void);
int moray_cpu_use(int instructions);   // 0, or -1 if this machine has no such instructions
int moray_cpu_used(void);
// AMX: 1: this machine has it, and it computes a product right; 0: it is not here, or may not be used; -1: the product is wrong.
int moray_cpu_amx(void);

// Threads that a call uses, the calling one included; while another thread's call runs, a call does with its own.
// Idle threads look for work for `spin_us` before they sleep.
int moray_set_threads(int threads, int spin_us);
int moray_threads(void);

// Bytes that a matrix takes when packed.
int64_t moray_packed_bytes(int32_t rows, int32_t cols, int32_t kind);
// source: [rows, cols] with `stride` elements from one row to the next.
void moray_pack(const void *source, int64_t stride, int32_t rows, int32_t cols, int32_t kind, void *packed);

// out [tokens, rows] = x [tokens, cols] times the matrix transposed; bf16, or fp32 if out_f32.
void moray_linear(const moray_bf16 *x, int32_t tokens, const moray_matrix *matrix, void *out, int out_f32);

// out [rows, width] = each row of x over its root mean square, times weight [width]; out may be x.
void moray_rms_norm(const moray_bf16 *x, int32_t rows, int32_t width, const moray_bf16 *weight, float eps, moray_bf16 *out);

// out [count, row_bytes] = rows of a table [rows, row_bytes] with these numbers. 0, or -1: one is out of range.
int moray_rows(const void *table, int64_t rows, int64_t row_bytes, const int64_t *numbers, int32_t count, void *out);

// What a moray_batch says of each token, from its segments and their pages. rotations: of each position, [positions, rope].
// 0, or -1: a position is out of range.
int moray_place(const int32_t *segment, int32_t segments, const int32_t *tables, int32_t page_size, const float *rotations,
                int64_t positions, int32_t rope, int64_t *cache_rows, float *rotation);

// One SwiGLU MLP for all rows of x [tokens, hidden]; out fp32 [tokens, hidden].
void moray_swiglu(const moray_bf16 *x, int32_t tokens, const moray_mlp *mlp, float *out);

// Each pair's row of hidden_states [tokens, hidden] through the MLP in its slot; out [pairs, hidden], in order of the pairs.
// slots ascend. 0; -1: a row is out of range; -2: a slot is empty or out of range.
int moray_grouped_mlp(const moray_bf16 *hidden_states, int32_t tokens, const int32_t *rows, const int32_t *slots,
                      int32_t pairs, const moray_mlp *mlps, int32_t num_slots, moray_bf16 *out);

// Attention around the residual, then the norm before the feed-forward part, and the gate if there is one.
// hidden [tokens, hidden] is read, and is the sum with the attention's output afterwards; cache [pages, page_size, row].
void moray_attention(const moray_layer *layer, const moray_batch *batch, moray_bf16 *hidden, moray_bf16 *cache,
                     moray_bf16 *normed, int64_t *topk_ids, float *topk_weights);

// Of the same only what it writes to the cache: for tokens whose own output nobody needs. Segments and tables are not read.
void moray_latents(const moray_layer *layer, const moray_batch *batch, const moray_bf16 *hidden, moray_bf16 *cache);

// hidden += bf16(routed + shared), each [tokens, width]; routed or shared may be NULL.
void moray_add(moray_bf16 *hidden, const float *routed, const float *shared, int64_t elements);

// out [tokens, width] = sum of outputs with weights [tokens, top_k], in order, each step rounded; outputs: [tokens * top_k]
// addresses of rows of `width`, which may lie anywhere.
void moray_combine(const moray_bf16 *const *outputs, const float *weights, int32_t tokens, int32_t top_k, int32_t width,
                   float *out);

// The chosen token of each row of logits [rows, width], `stride` elements from one to the next; -1 for a row whose largest
// logit is not finite. width: from 1 to 2^18 - 1.
void moray_sample(const float *logits, int64_t stride, int32_t rows, int32_t width, const moray_sampling *how,
                  int32_t *tokens);

#ifdef __cplusplus
}
#endif
#endif
