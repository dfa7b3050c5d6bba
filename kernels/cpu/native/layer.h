// The attention half of a layer in one parallel region, stage after stage; and the small steps around the experts.
#ifndef MORAY_LAYER_H
#define MORAY_LAYER_H

#include "attention.h"
#include "gemm.h"

namespace {

// Root-mean-square norm; rounded after the norm and after the weight, as torch does in bf16. In place if out is x.
INLINE void rms_norm(const bf16 *x, const bf16 *weight, int width, float eps, bf16 *out) {
    Floats squares = all(0.0f);
    int i = 0;
    for (; i + TILE <= width; i += TILE) squares = multiply_add(widen16(x + i), widen16(x + i), squares);
    float sum = sum_of(squares);
    for (int j = i; j < width; j++) sum += widen(x[j]) * widen(x[j]);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
    bf16 rounded[TILE];
    int c = 0;
    for (; c + TILE <= width; c += TILE) {
        narrow16(rounded, widen16(x + c) * all(scale));
        narrow16(out + c, widen16(weight + c) * widen16(rounded));
    }
    for (; c < width; c++) out[c] = narrow(widen(weight[c]) * widen(narrow(widen(x[c]) * scale)));
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

// Whether score `a` of expert or group `i` comes before `b` of `j`: a NaN before all numbers, of equals the lower number.
INLINE bool before(float a, int i, float b, int j) {
    if (a != a) return b == b || i < j;
    if (b != b) return false;
    return a > b || (a == b && i < j);
}

INLINE int best_of(const float *scores, int count, const uint8_t *barred) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (!(barred && barred[i]) && (best < 0 || before(scores[i], i, scores[best], best))) best = i;
    return best;
}

// The choice of kernels/gate.py for one token; `scores` and `choice` are room for `experts` floats each.
static void select_experts(const moray_layer &layer, const float *logits, float *scores, float *choice, uint8_t *barred,
                           int64_t *ids, float *weights) {
    const int experts = layer.experts, size = experts / layer.groups;
    if (layer.softmax) {
        float largest = logits[0], total = 0.0f;
        for (int e = 1; e < experts; e++) largest = logits[e] > largest ? logits[e] : largest;
        for (int e = 0; e < experts; e++) total += scores[e] = exponential(all(logits[e] - largest))[0];
        for (int e = 0; e < experts; e++) scores[e] /= total;
    } else {
        for (int e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + exponential(all(-logits[e]))[0]);
    }
    for (int e = 0; e < experts; e++) choice[e] = layer.gate_bias ? scores[e] + layer.gate_bias[e] : scores[e];
    memset(barred, 0, experts + layer.groups);
    uint8_t *barred_groups = barred + experts;
    if (layer.groups > 1) {
        float best[layer.groups];
        for (int g = 0; g < layer.groups; g++) {
            const float *member = choice + g * size;
            const int first = best_of(member, size, nullptr);
            best[g] = member[first];
            if (layer.gate_bias) {
                barred[g * size + first] = 1;
                best[g] += member[best_of(member, size, barred + g * size)];
                barred[g * size + first] = 0;
            }
        }
        for (int kept = 0; kept < layer.kept_groups; kept++) barred_groups[best_of(best, layer.groups, barred_groups)] = 1;
        // Experts of other groups come after all of these, lower numbers first: as if their scores were -infinity.
        for (int e = 0; e < experts; e++)
            if (!barred_groups[e / size]) choice[e] = -INFINITY;
    }
    float total = 0.0f;
    for (int k = 0; k < layer.top_k; k++) {
        const int e = best_of(choice, experts, barred);
        barred[e] = 1;
        ids[k] = e;
        weights[k] = scores[e];
        total += scores[e];
    }
    for (int k = 0; k < layer.top_k; k++) {
        if (layer.normalise) weights[k] /= total + 1e-20f;
        weights[k] *= layer.routed_scale;
    }
}

// Where a piece of work starts to read, of `heads` matrices whose groups are numbered one after the other; NULL past the last.
INLINE const uint8_t *start_of_piece(const moray_matrix *matrices, int heads, int piece) {
    const int groups = groups_in(matrices[0]);
    return piece < heads * groups ? start_of(matrices[piece / groups], piece % groups) : nullptr;
}

struct LayerJob {
    const moray_layer *layer;
    const moray_batch *batch;
    bf16 *hidden, *cache, *normed;
    int64_t *topk_ids;
    float *topk_weights;
    // Between stages; q is [tokens, heads * (nope + rope)], queries [tokens, heads, row], attended [tokens, heads, kv_rank],
    // context [tokens, heads * value].
    bf16 *x, *q_low, *latent, *q, *queries, *attended, *context, *out;
    float *logits;
    const Piece *pieces;
    int piece_count;
    moray::Stage stages[13];
};

static void layer_task(void *argument) {
    LayerJob &job = *static_cast<LayerJob *>(argument);
    const moray_layer &l = *job.layer;
    const moray_batch &b = *job.batch;
    const int tokens = b.tokens, head_width = l.nope + l.rope;
    const int64_t hidden_size = l.hidden, q_width = static_cast<int64_t>(l.heads) * head_width, row = b.row;
    moray::Stage *stage = job.stages;

    moray::share(stage[0], tokens, [&](int t) {
        rms_norm(job.hidden + t * hidden_size, l.attention_norm, l.hidden, l.eps, job.x + t * hidden_size);
    });
    moray::wait_for(stage[0], tokens);

    // What reads x: the queries, or what they are compressed to, and the latents. The latters' norm is not waited for before
    // attention, so that threads have work left while the queries' is computed.
    const moray_matrix &first = l.q_rank ? l.q_a : l.q_b;
    linear(first, job.x, l.hidden, tokens, l.q_rank ? job.q_low : job.q, first.rows, stage[1]);
    linear(l.kv_a, job.x, l.hidden, tokens, job.latent, row, stage[2]);
    moray::wait_for(stage[1], groups_in(first));
    if (l.q_rank) {
        moray::share(stage[3], tokens, [&](int t) {
            bf16 *low = job.q_low + static_cast<int64_t>(t) * l.q_rank;
            rms_norm(low, l.q_norm, l.q_rank, l.eps, low);
        });
        moray::wait_for(stage[3], tokens);
        linear(l.q_b, job.q_low, l.q_rank, tokens, job.q, q_width, stage[4]);
    }
    moray::wait_for(stage[2], groups_in(l.kv_a));
    moray::share(stage[5], tokens, [&](int t) {
        const bf16 *latent = job.latent + t * row;
        bf16 *cached = job.cache + b.cache_rows[t] * row;
        rms_norm(latent, l.kv_norm, l.kv_rank, l.eps, cached);
        rotate(latent + l.kv_rank, b.rotation + static_cast<int64_t>(t) * l.rope, l.rope, cached + l.kv_rank);
    });
    if (l.q_rank) moray::wait_for(stage[4], groups_in(l.q_b));

    const int absorbing = groups_in(l.key_up[0]);
    moray::share(stage[6], l.heads * absorbing, [&](int piece) {
        const int head = piece / absorbing;
        const bf16 *q = job.q + static_cast<int64_t>(head) * head_width;
        bf16 *to = job.queries + head * row;
        if (piece % absorbing == 0)
            for (int t = 0; t < tokens; t++)
                rotate(q + t * q_width + l.nope, b.rotation + static_cast<int64_t>(t) * l.rope, l.rope,
                       to + t * l.heads * row + l.kv_rank);
        multiply_group(
            l.key_up[head], piece % absorbing, tokens, [&](int t) { return q + t * q_width; },
            [&](int t, int at, int outputs, const float *totals) {
                keep_bf16(to + t * l.heads * row + at, totals, outputs);
            },
            start_of_piece(l.key_up, l.heads, piece + 1));
    });
    moray::wait_for(stage[6], l.heads * absorbing);
    moray::wait_for(stage[5], tokens);

    const AttentionJob attention = {&l, &b, job.queries, job.cache, job.attended};
    moray::share(stage[7], job.piece_count, [&](int piece) { attend(attention, job.pieces[piece]); });
    moray::wait_for(stage[7], job.piece_count);

    const int raising = groups_in(l.value_up[0]);
    const int64_t attended_width = static_cast<int64_t>(l.heads) * l.kv_rank;
    const int64_t context_width = static_cast<int64_t>(l.heads) * l.value;
    moray::share(stage[8], l.heads * raising, [&](int piece) {
        const int head = piece / raising;
        multiply_group(
            l.value_up[head], piece % raising, tokens,
            [&](int t) { return job.attended + t * attended_width + head * l.kv_rank; },
            [&](int t, int at, int outputs, const float *totals) {
                keep_bf16(job.context + t * context_width + head * l.value + at, totals, outputs);
            },
            start_of_piece(l.value_up, l.heads, piece + 1));
    });
    moray::wait_for(stage[8], l.heads * raising);

    linear(l.o, job.context, context_width, tokens, job.out, l.hidden, stage[9]);
    moray::wait_for(stage[9], groups_in(l.o));

    moray::share(stage[10], tokens, [&](int t) {
        bf16 *hidden = job.hidden + t * hidden_size;
        const bf16 *out = job.out + t * hidden_size;
        int i = 0;
        for (; i + TILE <= l.hidden; i += TILE) narrow16(hidden + i, widen16(hidden + i) + widen16(out + i));
        for (; i < l.hidden; i++) hidden[i] = narrow(widen(hidden[i]) + widen(out[i]));
        rms_norm(hidden, l.feed_forward_norm, l.hidden, l.eps, job.normed + t * hidden_size);
    });
    moray::wait_for(stage[10], tokens);
    if (!l.experts) return;

    moray::share(stage[11], groups_in(l.gate), [&](int group) {
        multiply_group(
            l.gate, group, tokens, [&](int t) { return job.normed + t * hidden_size; },
            [&](int t, int at, int outputs, const float *totals) {
                memcpy(job.logits + static_cast<int64_t>(t) * l.experts + at, totals, sizeof(float) * outputs);
            });
    });
    moray::wait_for(stage[11], groups_in(l.gate));

    float *room = static_cast<float *>(moray::scratch(moray::TOTALS, sizeof(float) * 4 * l.experts));
    moray::share(stage[12], tokens, [&](int t) {
        select_experts(l, job.logits + static_cast<int64_t>(t) * l.experts, room, room + l.experts,
                       reinterpret_cast<uint8_t *>(room + 2 * l.experts), job.topk_ids + static_cast<int64_t>(t) * l.top_k,
                       job.topk_weights + static_cast<int64_t>(t) * l.top_k);
    });
    moray::wait_for(stage[12], tokens);
}

// Pieces of about equal size, so many that every thread gets some.
static int plan_attention(const moray_layer &l, const moray_batch &b, int threads, Piece *pieces) {
    int tiles = 0;
    for (int s = 0; s < b.segments; s++) tiles += (b.segment[4 * s + 1] + QUERIES - 1) / QUERIES;
    int heads = l.heads < MOST_HEADS ? l.heads : MOST_HEADS;
    while (heads > 4 && tiles * ((l.heads + heads - 1) / heads) < threads) heads = (heads + 1) / 2;
    int count = 0;
    for (int s = 0; s < b.segments; s++)
        for (int q = 0; q < b.segment[4 * s + 1]; q += QUERIES)
            for (int h = 0; h < l.heads; h += heads, count++)
                if (pieces) {
                    const int left = b.segment[4 * s + 1] - q;
                    pieces[count] = {s, q, left < QUERIES ? left : QUERIES, h, l.heads - h < heads ? l.heads - h : heads};
                }
    return count;
}

static void attention(const moray_layer *layer, const moray_batch *batch, bf16 *hidden, bf16 *cache, bf16 *normed,
                      int64_t *topk_ids, float *topk_weights) {
    const moray_layer &l = *layer;
    const int64_t tokens = batch->tokens;
    if (!tokens) return;
    const int threads = moray_threads();
    const int count = plan_attention(l, *batch, threads, nullptr);
    const int64_t sizes[] = {
        l.hidden, l.q_rank, batch->row, static_cast<int64_t>(l.heads) * (l.nope + l.rope),
        static_cast<int64_t>(l.heads) * batch->row, static_cast<int64_t>(l.heads) * l.kv_rank,
        static_cast<int64_t>(l.heads) * l.value, l.hidden};
    size_t bytes = 0;
    for (int64_t size : sizes) bytes += (sizeof(bf16) * tokens * size + 127) & ~static_cast<size_t>(63);
    const size_t logit_bytes = (sizeof(float) * tokens * l.experts + 63) & ~static_cast<size_t>(63);
    uint8_t *memory = static_cast<uint8_t *>(moray::scratch(moray::SHARED, bytes + logit_bytes + sizeof(Piece) * count));
    bf16 *buffer[8];
    for (int i = 0; i < 8; i++) {
        buffer[i] = reinterpret_cast<bf16 *>(memory);
        memory += (sizeof(bf16) * tokens * sizes[i] + 127) & ~static_cast<size_t>(63);
    }
    Piece *pieces = reinterpret_cast<Piece *>(memory + logit_bytes);
    plan_attention(l, *batch, threads, pieces);
    LayerJob job = {layer, batch, hidden, cache, normed, topk_ids, topk_weights,
                    buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], buffer[5], buffer[6], buffer[7],
                    reinterpret_cast<float *>(memory), pieces, count, {}};
    moray::run(layer_task, &job);
}

struct LinearJob {
    const bf16 *x;
    int32_t tokens;
    const moray_matrix *matrix;
    void *out;
    int out_f32;
    moray::Stage groups;
};

static void linear_task(void *argument) {
    LinearJob &job = *static_cast<LinearJob *>(argument);
    const moray_matrix &m = *job.matrix;
    if (job.out_f32) {
        moray::share(job.groups, groups_in(m), [&](int group) {
            multiply_group(
                m, group, job.tokens, [&](int t) { return job.x + static_cast<int64_t>(t) * m.cols; },
                [&](int t, int at, int outputs, const float *totals) {
                    float *out = static_cast<float *>(job.out) + static_cast<int64_t>(t) * m.rows;
                    memcpy(out + at, totals, sizeof(float) * outputs);
                });
        });
    } else {
        linear(m, job.x, m.cols, job.tokens, static_cast<bf16 *>(job.out), m.rows, job.groups);
    }
    moray::wait_for(job.groups, groups_in(m));
}

static void linear_rows(const bf16 *x, int32_t tokens, const moray_matrix *matrix, void *out, int out_f32) {
    LinearJob job = {x, tokens, matrix, out, out_f32, {}};
    moray::run(linear_task, &job);
}

static void add(bf16 *hidden, const float *routed, const float *shared, int64_t elements) {
    int64_t i = 0;
    for (; i + TILE <= elements; i += TILE) {
        Floats sum = routed ? load(routed + i) : load(shared + i);
        if (routed && shared) sum = sum + load(shared + i);
        bf16 rounded[TILE];
        narrow16(rounded, sum);
        narrow16(hidden + i, widen16(hidden + i) + widen16(rounded));
    }
    for (; i < elements; i++) {
        float sum = routed ? routed[i] : shared[i];
        if (routed && shared) sum += shared[i];
        hidden[i] = narrow(widen(hidden[i]) + widen(narrow(sum)));
    }
}

struct CombineJob {
    const bf16 *const *outputs;
    const float *weights;
    int32_t tokens, top_k, width;
    float *out;
    moray::Stage rows;
};

static void combine_task(void *argument) {
    CombineJob &job = *static_cast<CombineJob *>(argument);
    moray::share(job.rows, job.tokens, [&](int t) {
        const bf16 *const *outputs = job.outputs + static_cast<int64_t>(t) * job.top_k;
        const float *weights = job.weights + static_cast<int64_t>(t) * job.top_k;
        float *out = job.out + static_cast<int64_t>(t) * job.width;
        int i = 0;
        // Whole cache lines of one output after the other: 16 columns at a time took 1.7 times as long (64 x 8 rows of 7168, Zen 5).
        for (; i + 4 * TILE <= job.width; i += 4 * TILE) {
            Floats total[4];
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) total[part] = widen16(outputs[0] + i + part * TILE) * all(weights[0]);
            for (int k = 1; k < job.top_k; k++) {
                const bf16 *output = outputs[k] + i;
                const Floats weight = all(weights[k]);
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++) total[part] = total[part] + widen16(output + part * TILE) * weight;
            }
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) store(out + i + part * TILE, total[part]);
        }
        for (; i + TILE <= job.width; i += TILE) {
            Floats total = widen16(outputs[0] + i) * all(weights[0]);
            for (int k = 1; k < job.top_k; k++) total = total + widen16(outputs[k] + i) * all(weights[k]);
            store(out + i, total);
        }
        for (; i < job.width; i++) {
            float total = widen(outputs[0][i]) * weights[0];
            for (int k = 1; k < job.top_k; k++) total = total + widen(outputs[k][i]) * weights[k];
            out[i] = total;
        }
    });
    moray::wait_for(job.rows, job.tokens);
}

static void combine(const bf16 *const *outputs, const float *weights, int32_t tokens, int32_t top_k, int32_t width, float *out) {
    CombineJob job = {outputs, weights, tokens, top_k, width, out, {}};
    if (static_cast<int64_t>(tokens) * top_k * width < 1 << 17)  // less than a wake-up costs
        combine_task(&job);
    else
        moray::run(combine_task, &job);
}

}  // namespace
#endif
