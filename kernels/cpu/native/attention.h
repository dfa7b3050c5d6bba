// Absorbed multi-head latent attention over pages (DeepSeek-V2 report, section 2.1, arXiv:2405.04434), by online softmax
// (Milakov and Gimelshein, 2018, arXiv:1805.02867) over blocks of 32 keys.
//
// A row is one head of one query. Blocks begin at multiples of 32 positions, so what a row adds up, and in which order,
// depends on its own position alone; a block that a row sees nothing of changes no bit of it. Keys and values of a block are
// packed once, like weights, for all rows that one piece of work has: up to 8 queries of a sequence times its heads.
#ifndef MORAY_ATTENTION_H
#define MORAY_ATTENTION_H

#include "keys.h"

namespace {

constexpr int QUERIES = 8;      // queries of a sequence that share a pass over its keys
constexpr int MOST_HEADS = 16;  // heads that do: 128 rows, whose sums of 512 fp32 fit the second cache

// Where the rows of a block begin in the cache; NULL past the last position.
INLINE void rows_of_block(const bf16 *cache, const int32_t *table, int page_size, int width, int first, int last,
                          const bf16 **rows) {
    for (int i = 0; i < KEYS; i++) {
        const int position = first + i;
        const int64_t row = static_cast<int64_t>(table[(position <= last ? position : last) / page_size]) * page_size +
                            position % page_size;
        rows[i] = position <= last ? cache + row * width : nullptr;
    }
}

// Rows begin to end of a block, as lines to be fetched: those that lie one after the other, which are all where a page holds whole
// blocks. The others are asked for at once.
INLINE Prefetch lines_of_rows(const bf16 *const *rows, int begin, int end, int width) {
    const auto lines = [&](int row, int count) -> Prefetch {
        return {reinterpret_cast<const uint8_t *>(rows[row]), count * width / 32};
    };
    int row = begin;
    while (row < end && rows[row] && rows[row] == rows[begin] + static_cast<int64_t>(row - begin) * width) row++;
    for (int other = row; other < end && rows[other]; other++) fetch(lines(other, 1));
    return lines(begin, row - begin);
}

// One piece of work: queries and heads of one sequence.
struct Piece {
    int segment, first_query, queries, first_head, heads;
};

struct AttentionJob {
    const moray_layer *layer;
    const moray_batch *batch;
    const bf16 *queries;  // [tokens, heads, row], absorbed and rotated
    const bf16 *cache;    // [pages, page_size, row]
    bf16 *out;            // [tokens, heads, kv_rank]
};

// The rows of the block that a piece begins with.
INLINE void first_rows(const AttentionJob &job, const Piece &piece, const bf16 **rows) {
    const int32_t *segment = job.batch->segment + 4 * piece.segment;
    rows_of_block(job.cache, job.batch->tables + segment[3], job.batch->page_size, job.batch->row, 0,
                  segment[2] + piece.first_query + piece.queries - 1, rows);
}

INLINE void fetch_first_rows(const AttentionJob &job, const Piece &piece) {
    const bf16 *rows[KEYS];
    first_rows(job, piece, rows);
    fetch(lines_of_rows(rows, 0, KEYS, job.batch->row));
}

// `next`: the piece after it, whose first keys are fetched; or NULL.
static void attend(const AttentionJob &job, const Piece &piece, const Piece *next) {
    const moray_layer &layer = *job.layer;
    const moray_batch &batch = *job.batch;
    const int32_t *segment = batch.segment + 4 * piece.segment;
    const int32_t *table = batch.tables + segment[3];
    const int width = batch.row, value = layer.kv_rank;
    const int rows = piece.queries * piece.heads;
    const int first_position = segment[2] + piece.first_query;
    const int last_position = first_position + piece.queries - 1;

    const size_t total_bytes = sizeof(float) * rows * value;
    float *totals =
        static_cast<float *>(moray::scratch(moray::ATTENTION, total_bytes + rows * (KEYS * 6 + 8) + 256));
    float *scores = totals + static_cast<int64_t>(rows) * value;
    bf16 *weights = reinterpret_cast<bf16 *>(scores + rows * KEYS);
    float *peak = reinterpret_cast<float *>(weights + rows * KEYS), *mass = peak + rows;

    const bf16 *query[QUERIES * MOST_HEADS], *probability[QUERIES * MOST_HEADS];
    memset(totals, 0, total_bytes);
    for (int q = 0; q < piece.queries; q++)
        for (int h = 0; h < piece.heads; h++) {
            const int r = q * piece.heads + h;
            const int64_t token = segment[0] + piece.first_query + q;
            query[r] = job.queries + (token * layer.heads + piece.first_head + h) * width;
            probability[r] = weights + r * KEYS;
            peak[r] = -INFINITY;
            mass[r] = 0.0f;
        }
    // So few columns are packed at a time that they stay in the first cache.
    alignas(64) uint8_t keys[KEYS * BLOCK * sizeof(bf16)], values[KEYS * GROUP * TILE * sizeof(bf16)];
    const Floats scale = all(layer.softmax_scale);
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;

    // Rows past the last query may hold anything, NaN included: they are zeros here, and masked below.
    const bf16 *blocks[2][KEYS];
    first_rows(job, piece, blocks[0]);
    for (int key = 0; key <= last_position; key += KEYS) {
        const bf16 **row = blocks[key / KEYS % 2], **later = blocks[(key / KEYS + 1) % 2];
        if (key + KEYS <= last_position || !next)
            rows_of_block(job.cache, table, batch.page_size, width, key + KEYS, last_position, later);
        else
            first_rows(job, *next, later);
        memset(scores, 0, sizeof(float) * rows * KEYS);
        for (int c = 0, fetched = 0; c < width; c += BLOCK) {
            const int end = c + BLOCK < width ? c + BLOCK : width, fetching = KEYS * end / width;
            pack_keys(row, c, end, keys);
            multiply_packed(query, rows, KEYS / TILE, keys, c, end, scores, KEYS, lines_of_rows(later, fetched, fetching, width));
            fetched = fetching;
        }
        for (int r = 0; r < rows; r++) {
            const int seen = first_position + r / piece.heads - key + 1;  // keys of this block that the row sees
            if (seen <= 0) {
                memset(weights + r * KEYS, 0, sizeof(bf16) * KEYS);
                continue;
            }
            Floats weight[KEYS / LANES], most = all(-INFINITY), sum = all(0.0f);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS / LANES; i++) {
                weight[i] = load(scores + r * KEYS + i * LANES) * scale;
                weight[i] = lane + i * LANES < seen ? weight[i] : all(-INFINITY);
                most = larger(most, weight[i]);
            }
            const float found = largest_of(most), old = peak[r];
            const float now = found > old ? found : old;
#pragma GCC unroll 8
            for (int i = 0; i < KEYS / LANES; i++) {
                weight[i] = exponential(weight[i] - all(now));
                narrow_to(weights + r * KEYS + i * LANES, weight[i]);
                sum = sum + weight[i];
            }
            if (now != old) {
                float *total = totals + static_cast<int64_t>(r) * value;
                const Floats fade = exponential(all(old - now));
                mass[r] *= fade[0];
                for (int c = 0; c < value; c += LANES) store(total + c, load(total + c) * fade);
                peak[r] = now;
            }
            mass[r] += sum_of(sum);
        }
        for (int c = 0; c < value; c += GROUP * TILE) {
            const int count = value - c < GROUP * TILE ? (value - c) / TILE : GROUP;
            pack_values(row, c, count, values);
            multiply_packed(probability, rows, count, values, 0, KEYS, totals + c, value, {nullptr, 0});
        }
    }
    for (int r = 0; r < rows; r++) {
        const int64_t token = segment[0] + piece.first_query + r / piece.heads;
        bf16 *out = job.out + (token * layer.heads + piece.first_head + r % piece.heads) * value;
        const Floats whole = all(mass[r]);
        for (int c = 0; c < value; c += LANES) narrow_to(out + c, load(totals + static_cast<int64_t>(r) * value + c) / whole);
    }
}

}  // namespace
#endif
