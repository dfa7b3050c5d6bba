// What a layer keeps of its tokens: rows of the cache, from the residual. And the norms that layers are full of.
#ifndef MORAY_LATENTS_H
#define MORAY_LATENTS_H

#include "gemm.h"

namespace {

// Root-mean-square norm; rounded after the norm and after the weight, as torch does in bf16. In place if out is x.
INLINE void rms_norm(const bf16 *x, const bf16 *weight, int width, float eps, bf16 *out) {
    Floats squares = all(0.0f);
    int i = 0;
    for (; i + LANES <= width; i += LANES) squares = multiply_add(widen_at(x + i), widen_at(x + i), squares);
    float sum = sum_of(squares);
    for (int j = i; j < width; j++) sum += widen(x[j]) * widen(x[j]);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
    bf16 rounded[LANES];
    int c = 0;
    for (; c + LANES <= width; c += LANES) {
        narrow_to(rounded, widen_at(x + c) * all(scale));
        narrow_to(out + c, widen_at(weight + c) * widen_at(rounded));
    }
    for (; c < width; c++) out[c] = narrow(widen(weight[c]) * widen(narrow(widen(x[c]) * scale)));
}

struct NormJob {
    const bf16 *x, *weight;
    int32_t rows, width;
    float eps;
    bf16 *out;
    moray::Stage done;
};

static void norm_task(void *argument) {
    NormJob &job = *static_cast<NormJob *>(argument);
    moray::share(job.done, job.rows, [&](int row) {
        const int64_t at = static_cast<int64_t>(row) * job.width;
        rms_norm(job.x + at, job.weight, job.width, job.eps, job.out + at);
    });
    moray::wait_for(job.done, job.rows);
}

static void norm_rows(const bf16 *x, int32_t rows, int32_t width, const bf16 *weight, float eps, bf16 *out) {
    NormJob job = {x, weight, rows, width, eps, out, {}};
    if (static_cast<int64_t>(rows) * width < 1 << 17)  // less than a wake-up costs
        norm_task(&job);
    else
        moray::run(norm_task, &job);
}

// Pairs (x0, x1), (x2, x3), ... turned by the token's angles; not in place. In two loops: where differences and sums stand side
// by side, GCC 12 makes one fused instruction of them and the products, in spite of -ffp-contract=off, and other bits.
INLINE void rotate(const bf16 *x, const float *rotation, int width, bf16 *out) {
    for (int i = 0; i < width; i += 2) {
        const float a = widen(x[i]) * rotation[i], b = widen(x[i + 1]) * rotation[i + 1];
        out[i] = narrow(a - b);
    }
    for (int i = 0; i < width; i += 2) {
        const float a = widen(x[i]) * rotation[i + 1], b = widen(x[i + 1]) * rotation[i];
        out[i + 1] = narrow(a + b);
    }
}

// With so few tokens each thread computes a norm that all of them need for itself: less than waiting for another's takes.
constexpr int FEW = 2;

// Rows that every thread needs, by `norm(token, out)`: in memory of its own, or in `common` once all are done.
template <typename Norm>
INLINE const bf16 *normed_rows(int tokens, int64_t width, bf16 *common, moray::Stage &stage, Norm norm) {
    if (tokens <= FEW) {
        bf16 *own = static_cast<bf16 *>(moray::scratch(moray::NORMED, sizeof(bf16) * tokens * width));
        for (int t = 0; t < tokens; t++) norm(t, own + t * width);
        return own;
    }
    moray::share(stage, tokens, [&](int t) { norm(t, common + t * width); });
    moray::wait_for(stage, tokens);
    return common;
}

// A token's row of the cache, from its compressed keys and values [tokens, row].
INLINE void write_latent(const moray_layer &l, const moray_batch &b, const bf16 *latents, bf16 *cache, int t) {
    const bf16 *latent = latents + static_cast<int64_t>(t) * b.row;
    bf16 *cached = cache + b.cache_rows[t] * b.row;
    rms_norm(latent, l.kv_norm, l.kv_rank, l.eps, cached);
    rotate(latent + l.kv_rank, b.rotation + static_cast<int64_t>(t) * l.rope, l.rope, cached + l.kv_rank);
}

struct LatentsJob {
    const moray_layer *layer;
    const moray_batch *batch;
    const bf16 *hidden;
    bf16 *cache, *x, *latents;
    moray::Stage norm, kv_a, rows;
};

static void latents_task(void *argument) {
    LatentsJob &job = *static_cast<LatentsJob *>(argument);
    const moray_layer &l = *job.layer;
    const moray_batch &b = *job.batch;
    const bf16 *x = normed_rows(b.tokens, l.hidden, job.x, job.norm, [&](int t, bf16 *out) {
        rms_norm(job.hidden + static_cast<int64_t>(t) * l.hidden, l.attention_norm, l.hidden, l.eps, out);
    });
    linear(l.kv_a, x, l.hidden, b.tokens, job.latents, b.row, job.kv_a);
    moray::wait_for(job.kv_a, groups_in(l.kv_a));
    moray::share(job.rows, b.tokens, [&](int t) { write_latent(l, b, job.latents, job.cache, t); });
    moray::wait_for(job.rows, b.tokens);
}

static void latents(const moray_layer *layer, const moray_batch *batch, const bf16 *hidden, bf16 *cache) {
    const int64_t tokens = batch->tokens;
    if (!tokens) return;
    const size_t normed_bytes = (sizeof(bf16) * tokens * layer->hidden + 63) & ~static_cast<size_t>(63);
    uint8_t *memory =
        static_cast<uint8_t *>(moray::scratch(moray::SHARED, normed_bytes + sizeof(bf16) * tokens * batch->row));
    LatentsJob job = {layer, batch, hidden, cache, reinterpret_cast<bf16 *>(memory),
                      reinterpret_cast<bf16 *>(memory + normed_bytes), {}, {}, {}};
    moray::run(with_products<latents_task>, &job);
}

}  // namespace
#endif
