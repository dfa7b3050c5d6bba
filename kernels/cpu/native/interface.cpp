// The C interface: chooses instructions, packs matrices, and hands everything else on.
#include <string.h>

#include "kernels.h"
#include "pool.h"

namespace {

const moray::Kernels *kernels = nullptr;
int used = 0;

int bytes_of(int kind) { return kind == MORAY_E4M3 ? 1 : kind == MORAY_BF16 ? 2 : 4; }

struct Packing {
    const uint8_t *source;
    int64_t stride;
    int32_t rows, cols, kind;
    uint8_t *packed;
    moray::Stage tiles;
};

void pack_task(void *argument) {
    Packing &job = *static_cast<Packing *>(argument);
    const int size = bytes_of(job.kind), step = 4 / size;
    const int tiles = (job.rows + 15) / 16;
    moray::share(job.tiles, tiles, [&](int tile) {
        const int group = tile - tile % MORAY_GROUP, together = tiles - group < MORAY_GROUP ? tiles - group : MORAY_GROUP;
        uint8_t *to = job.packed + static_cast<int64_t>(group) * 16 * job.cols * size + (tile - group) * 64;
        const int rows = job.rows - tile * 16 < 16 ? job.rows - tile * 16 : 16;
        for (int row = 0; row < 16; row++) {
            const uint8_t *from = job.source + (static_cast<int64_t>(tile) * 16 + row) * job.stride * size;
            for (int32_t column = 0; column < job.cols; column += step) {
                uint8_t *at = to + static_cast<int64_t>(column) / step * together * 64;
                uint8_t four[4] = {0, 0, 0, 0};
                if (row < rows) memcpy(four, from + static_cast<int64_t>(column) * size, 4);
                if (job.kind == MORAY_E4M3) {  // see the end of vector.h
                    at += 16 * (row / 4) + 2 * (row % 4);
                    memcpy(at, four, 2);
                    memcpy(at + 8, four + 2, 2);
                } else {
                    memcpy(at + 4 * row, four, 4);
                }
            }
        }
    });
    moray::wait_for(job.tiles, tiles);
}

}  // namespace

extern "C" {

int moray_cpu_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bf16")) return MORAY_AVX512;
        return moray_cpu_amx() > 0 ? MORAY_AMX : MORAY_AVX512_BF16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MORAY_AVX2;
#endif
    return MORAY_GENERIC;
}

int moray_cpu_use(int instructions) {
    if (instructions < MORAY_GENERIC || instructions > moray_cpu_best()) return -1;
    const moray::Kernels *chosen = &moray::generic_kernels;
#if defined(__x86_64__)
#if __has_include(<amxtileintrin.h>)
    if (instructions == MORAY_AMX) chosen = &moray::amx_kernels;
#endif
    if (instructions == MORAY_AVX512_BF16) chosen = &moray::avx512_bf16_kernels;
    if (instructions == MORAY_AVX512) chosen = &moray::avx512_kernels;
    if (instructions == MORAY_AVX2) chosen = &moray::avx2_kernels;
#endif
    chosen->prepare();
    kernels = chosen;
    used = instructions;
    return 0;
}

int moray_cpu_used(void) { return used; }

int64_t moray_packed_bytes(int32_t rows, int32_t cols, int32_t kind) {
    return static_cast<int64_t>((rows + 15) / 16) * 16 * cols * bytes_of(kind);
}

void moray_pack(const void *source, int64_t stride, int32_t rows, int32_t cols, int32_t kind, void *packed) {
    Packing job = {static_cast<const uint8_t *>(source), stride, rows, cols, kind, static_cast<uint8_t *>(packed), {}};
    moray::run(pack_task, &job);
}

void moray_linear(const moray_bf16 *x, int32_t tokens, const moray_matrix *matrix, void *out, int out_f32) {
    kernels->linear(x, tokens, matrix, out, out_f32);
}

void moray_rms_norm(const moray_bf16 *x, int32_t rows, int32_t width, const moray_bf16 *weight, float eps, moray_bf16 *out) {
    kernels->rms_norm(x, rows, width, weight, eps, out);
}

void moray_swiglu(const moray_bf16 *x, int32_t tokens, const moray_mlp *mlp, float *out) {
    kernels->swiglu(x, tokens, mlp, out);
}

int moray_grouped_mlp(const moray_bf16 *hidden_states, int32_t tokens, const int32_t *rows, const int32_t *slots,
                      int32_t pairs, const moray_mlp *mlps, int32_t num_slots, moray_bf16 *out) {
    return kernels->grouped_mlp(hidden_states, tokens, rows, slots, pairs, mlps, num_slots, out);
}

void moray_attention(const moray_layer *layer, const moray_batch *batch, moray_bf16 *hidden, moray_bf16 *cache,
                     moray_bf16 *normed, int64_t *topk_ids, float *topk_weights) {
    kernels->attention(layer, batch, hidden, cache, normed, topk_ids, topk_weights);
}

void moray_latents(const moray_layer *layer, const moray_batch *batch, const moray_bf16 *hidden, moray_bf16 *cache) {
    kernels->latents(layer, batch, hidden, cache);
}

void moray_add(moray_bf16 *hidden, const float *routed, const float *shared, int64_t elements) {
    if (routed || shared) kernels->add(hidden, routed, shared, elements);
}

void moray_combine(const moray_bf16 *const *outputs, const float *weights, int32_t tokens, int32_t top_k, int32_t width,
                   float *out) {
    kernels->combine(outputs, weights, tokens, top_k, width, out);
}

void moray_sample(const float *logits, int64_t stride, int32_t rows, int32_t width, const moray_sampling *how,
                  int32_t *tokens) {
    kernels->sample(logits, stride, rows, width, how, tokens);
}

}  // extern "C"
