// The attention half of a layer in one parallel region, stage after stage.
#ifndef MORAY_LAYER_H
#define MORAY_LAYER_H

#include "attention.h"
#include "gate.h"
#include "latents.h"

namespace {

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
    bf16 *x, *q_low, *latent, *q, *queries, *attended, *context;
    float *logits;
    const Piece *pieces;
    int piece_count, query_tiles;
    moray::Stage *heads;  // [3, heads]: of each, groups of q_b, of key_up, and tiles of queries that are done
    moray::Stage norm, q_a, kv_a, q_norm, q_b, latents, key_up, attention, value_up, o, feed_forward_norm, gate, selection;
};

// The groups of a matrix that hold rows of `head`, `width` rows each: from the first on, how many.
INLINE int first_group_of(int head, int width) { return head * width / (GROUP * TILE); }
INLINE int groups_of_head(int head, int width) {
    return ((head + 1) * width - 1) / (GROUP * TILE) - first_group_of(head, width) + 1;
}

// From x to what each head attended to. A thread that finds nothing left of one matrix goes on to the next: it waits for what
// its piece needs, of a head, which in the order of the pieces is nearly always there.
static void attend_heads(LayerJob &job) {
    const moray_layer &l = *job.layer;
    const moray_batch &b = *job.batch;
    const int tokens = b.tokens, head_width = l.nope + l.rope;
    const int64_t hidden_size = l.hidden, row = b.row, q_width = static_cast<int64_t>(l.heads) * head_width;
    moray::Stage *q_done = job.heads, *key_done = q_done + l.heads, *attended = key_done + l.heads;

    const bf16 *x = nullptr, *low = nullptr;
    const auto need_x = [&](int, int) {
        if (x) return;
        x = normed_rows(tokens, hidden_size, job.x, job.norm, [&](int t, bf16 *out) {
            rms_norm(job.hidden + t * hidden_size, l.attention_norm, l.hidden, l.eps, out);
        });
    };
    const auto project = [&](const moray_matrix &m, bf16 *out, moray::Stage &stage) {
        moray::share(stage, groups_in(m), need_x, [&](int group) {
            multiply_group(
                m, group, tokens, [&](int t) { return x + t * hidden_size; },
                [&](int t, int at, int outputs, const float *totals) {
                    keep_bf16(out + static_cast<int64_t>(t) * m.rows + at, totals, outputs);
                });
        });
    };
    if (l.q_rank) project(l.q_a, job.q_low, job.q_a);
    project(l.kv_a, job.latent, job.kv_a);

    moray::share(
        job.q_b, groups_in(l.q_b),
        [&](int group, int count) {
            if (low) return;
            if (!l.q_rank) {
                need_x(0, 0);
                low = x;
                return;
            }
            moray::wait_for(job.q_a, groups_in(l.q_a), groups_ahead(l.q_b, group, count));
            low = normed_rows(tokens, l.q_rank, job.q_low, job.q_norm, [&](int t, bf16 *out) {
                rms_norm(job.q_low + static_cast<int64_t>(t) * l.q_rank, l.q_norm, l.q_rank, l.eps, out);
            });
        },
        [&](int group) {
            multiply_group(
                l.q_b, group, tokens, [&](int t) { return low + static_cast<int64_t>(t) * l.q_b.cols; },
                [&](int t, int at, int outputs, const float *totals) { keep_bf16(job.q + t * q_width + at, totals, outputs); });
            for (int h = group * GROUP * TILE / head_width; h < l.heads && first_group_of(h, head_width) <= group; h++)
                moray::did(q_done[h], groups_of_head(h, head_width));
        });

    moray::share(
        job.latents, tokens, [&](int, int) { moray::wait_for(job.kv_a, groups_in(l.kv_a)); },
        [&](int t) { write_latent(l, b, job.latent, job.cache, t); });

    const int absorbing = groups_in(l.key_up[0]);
    moray::share(job.key_up, l.heads * absorbing, [&](int piece) {
        const int head = piece / absorbing, group = piece % absorbing;
        moray::wait_for(q_done[head], groups_of_head(head, head_width), groups_ahead(l.key_up[head], group, absorbing));
        const bf16 *q = job.q + static_cast<int64_t>(head) * head_width;
        bf16 *to = job.queries + head * row;
        if (group == 0)
            for (int t = 0; t < tokens; t++)
                rotate(q + t * q_width + l.nope, b.rotation + static_cast<int64_t>(t) * l.rope, l.rope,
                       to + t * l.heads * row + l.kv_rank);
        multiply_group(
            l.key_up[head], group, tokens, [&](int t) { return q + t * q_width; },
            [&](int t, int at, int outputs, const float *totals) {
                keep_bf16(to + t * l.heads * row + at, totals, outputs);
            },
            start_of_piece(l.key_up, l.heads, piece + 1));
        moray::did(key_done[head], absorbing);
    });

    const int raising = groups_in(l.value_up[0]);
    const AttentionJob attention = {&l, &b, job.queries, job.cache, job.attended};
    int expected = -1;  // the piece whose first keys were fetched already
    moray::share(job.attention, job.piece_count, [&](int number) {
        const Piece &piece = job.pieces[number];
        if (number != expected) fetch_first_rows(attention, piece);
        expected = number + 1;
        moray::wait_for(job.latents, tokens);
        for (int h = piece.first_head; h < piece.first_head + piece.heads; h++)
            moray::wait_for(key_done[h], absorbing, groups_ahead(l.value_up[h], 0, raising));
        attend(attention, piece, number + 1 < job.piece_count ? job.pieces + number + 1 : nullptr);
        for (int h = piece.first_head; h < piece.first_head + piece.heads; h++) moray::did(attended[h], job.query_tiles);
    });

    const int64_t attended_width = static_cast<int64_t>(l.heads) * l.kv_rank;
    const int64_t context_width = static_cast<int64_t>(l.heads) * l.value;
    moray::share(job.value_up, l.heads * raising, [&](int piece) {
        const int head = piece / raising, group = piece % raising;
        moray::wait_for(attended[head], job.query_tiles, groups_ahead(l.value_up[head], group, raising));
        multiply_group(
            l.value_up[head], group, tokens, [&](int t) { return job.attended + t * attended_width + head * l.kv_rank; },
            [&](int t, int at, int outputs, const float *totals) {
                keep_bf16(job.context + t * context_width + head * l.value + at, totals, outputs);
            },
            start_of_piece(l.value_up, l.heads, piece + 1));
    });
}

static void layer_task(void *argument) {
    LayerJob &job = *static_cast<LayerJob *>(argument);
    const moray_layer &l = *job.layer;
    const int tokens = job.batch->tokens;
    const int64_t hidden_size = l.hidden, context_width = static_cast<int64_t>(l.heads) * l.value;

    attend_heads(job);

    const int value_pieces = l.heads * groups_in(l.value_up[0]);
    moray::share(
        job.o, groups_in(l.o),
        [&](int group, int count) { moray::wait_for(job.value_up, value_pieces, groups_ahead(l.o, group, count)); },
        [&](int group) {
            multiply_group(
                l.o, group, tokens, [&](int t) { return job.context + t * context_width; },
                [&](int t, int at, int outputs, const float *totals) {
                    bf16 rounded[GROUP * TILE], *hidden = job.hidden + t * hidden_size + at;
                    keep_bf16(rounded, totals, outputs);
                    int i = 0;
                    for (; i + LANES <= outputs; i += LANES)
                        narrow_to(hidden + i, widen_at(hidden + i) + widen_at(rounded + i));
                    for (; i < outputs; i++) hidden[i] = narrow(widen(hidden[i]) + widen(rounded[i]));
                });
        });

    // The gate two tiles at a time: of few experts, there are no groups for all threads.
    constexpr int PART = 2;
    const int parts = l.experts ? (tiles_in(l.gate) + PART - 1) / PART : 0;
    const bf16 *normed = nullptr;
    const auto norm = [&](int t, bf16 *out) {
        rms_norm(job.hidden + t * hidden_size, l.feed_forward_norm, l.hidden, l.eps, out);
    };
    moray::share(
        job.gate, parts,
        [&](int part, int) {
            if (normed) return;
            moray::wait_for(job.o, groups_in(l.o), tiles_ahead(l.gate, part * PART, PART));
            normed = normed_rows(tokens, l.hidden, job.normed, job.feed_forward_norm, norm);
        },
        [&](int part) {
            const Tiles tiles = tiles_of(l.gate, part * PART, PART);
            multiply_part(
                l.gate, part * PART, tiles, tokens, [&](int t) { return normed + t * hidden_size; },
                [&](int t, int at, int outputs, const float *totals) {
                    memcpy(job.logits + static_cast<int64_t>(t) * l.experts + at, totals, sizeof(float) * outputs);
                });
        });
    // What others are given of the norm, where no thread has written it yet.
    moray::share(
        job.feed_forward_norm, tokens, [&](int, int) { moray::wait_for(job.o, groups_in(l.o)); },
        [&](int t) { norm(t, job.normed + t * hidden_size); });
    if (l.experts) {
        float *room = static_cast<float *>(moray::scratch(moray::TOTALS, sizeof(float) * 3 * l.experts));
        moray::share(
            job.selection, tokens, [&](int, int) { moray::wait_for(job.gate, parts); },
            [&](int t) {
                select_experts(l, job.logits + static_cast<int64_t>(t) * l.experts, room, room + l.experts,
                               reinterpret_cast<int32_t *>(room + 2 * l.experts),
                               job.topk_ids + static_cast<int64_t>(t) * l.top_k,
                               job.topk_weights + static_cast<int64_t>(t) * l.top_k);
            });
        moray::wait_for(job.selection, tokens);
    }
    moray::wait_for(job.feed_forward_norm, tokens);
}

static int query_tiles_in(const moray_batch &b) {
    int tiles = 0;
    for (int s = 0; s < b.segments; s++) tiles += (b.segment[4 * s + 1] + QUERIES - 1) / QUERIES;
    return tiles;
}

// Pieces of about equal size, so many that every thread gets some.
static int plan_attention(const moray_layer &l, const moray_batch &b, int threads, Piece *pieces) {
    const int tiles = query_tiles_in(b);
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
        static_cast<int64_t>(l.heads) * l.value};
    size_t bytes = 0;
    for (int64_t size : sizes) bytes += (sizeof(bf16) * tokens * size + 127) & ~static_cast<size_t>(63);
    const size_t logit_bytes = (sizeof(float) * tokens * l.experts + 63) & ~static_cast<size_t>(63);
    const size_t head_bytes = sizeof(moray::Stage) * 3 * l.heads;
    uint8_t *memory =
        static_cast<uint8_t *>(moray::scratch(moray::SHARED, bytes + logit_bytes + head_bytes + sizeof(Piece) * count));
    bf16 *buffer[7];
    for (int i = 0; i < 7; i++) {
        buffer[i] = reinterpret_cast<bf16 *>(memory);
        memory += (sizeof(bf16) * tokens * sizes[i] + 127) & ~static_cast<size_t>(63);
    }
    moray::Stage *heads = reinterpret_cast<moray::Stage *>(memory + logit_bytes);
    memset(heads, 0, head_bytes);
    Piece *pieces = reinterpret_cast<Piece *>(memory + logit_bytes + head_bytes);
    plan_attention(l, *batch, threads, pieces);
    LayerJob job = {layer, batch, hidden, cache, normed, topk_ids, topk_weights,
                    buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], buffer[5], buffer[6],
                    reinterpret_cast<float *>(memory), pieces, count, query_tiles_in(*batch), heads,
                    {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    moray::run(with_products<layer_task>, &job);
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
    moray::run(with_products<linear_task>, &job);
}

}  // namespace
#endif
