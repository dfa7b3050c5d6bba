// Absorbed multi-head latent attention over pages (DeepSeek-V2 report, section 2.1, arXiv:2405.04434), by online softmax
// (Milakov and Gimelshein, 2018, arXiv:1805.02867) over blocks of 32 keys.
//
// A row is one head of one query. Blocks begin at multiples of 32 positions, so what a row adds up, and in which order,
// depends on its own position alone; a block that a row sees nothing of changes no bit of it. Keys and values of a block are
// packed once, like weights, for all rows that one piece of work has: up to 8 queries of a sequence times its heads.
#ifndef MORAY_ATTENTION_H
#define MORAY_ATTENTION_H

#include "gemm.h"

namespace {

constexpr int KEYS = 32;
constexpr int QUERIES = 8;      // queries of a sequence that share a pass over its keys
constexpr int MOST_HEADS = 16;  // heads that do: 128 rows, whose sums of 512 fp32 fit the second cache

// Sixteen vectors of sixteen words become their columns, in four rounds of exchanging blocks of 1, 2, 4 and 8.
INLINE void transpose(Ints *v) {
#define EXCHANGE(W, LOW, HIGH)                   \
    for (int i = 0; i < 16; i++) {               \
        if (i & W) continue;                     \
        const Ints a = v[i], b = v[i + W];       \
        v[i] = SHUFFLE(a, b, LOW);               \
        v[i + W] = SHUFFLE(a, b, HIGH);          \
    }
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#pragma GCC unroll 16
    EXCHANGE(1, LOW1, HIGH1)
#pragma GCC unroll 16
    EXCHANGE(2, LOW2, HIGH2)
#pragma GCC unroll 16
    EXCHANGE(4, LOW4, HIGH4)
#pragma GCC unroll 16
    EXCHANGE(8, LOW8, HIGH8)
#undef EXCHANGE
}

constexpr int KEY_STEP = KEYS / TILE * 64;  // bytes that two columns of all keys of a block take

// Columns begin to end, an even number, of sixteen rows (NULL: zeros), as one tile of a group of two.
INLINE void pack_keys(const bf16 *const *rows, int begin, int end, uint8_t *packed) {
    int column = begin;
    for (; column + 32 <= end; column += 32, packed += 16 * KEY_STEP) {
        Ints v[16];
        for (int r = 0; r < 16; r++) v[r] = rows[r] ? load_words(rows[r] + column) : (Ints){};
        transpose(v);
        for (int i = 0; i < 16; i++) store_words(packed + i * KEY_STEP, v[i]);
    }
    for (; column < end; column += 2, packed += KEY_STEP)
        for (int r = 0; r < 16; r++) {
            const int32_t zero = 0;
            memcpy(packed + r * 4, rows[r] ? static_cast<const void *>(rows[r] + column) : &zero, 4);
        }
}

// Columns `column` and the `tiles` times sixteen from it on of 32 rows (NULL: zeros), as a group of tiles: pairs of rows.
INLINE void pack_values(const bf16 *const *rows, int column, int tiles, uint8_t *packed) {
    const bf16 nothing[16] = {};
    for (int p = 0; p < KEYS / 2; p++)
        for (int t = 0; t < tiles; t++, packed += 64) {
            const bf16 *even = rows[2 * p] ? rows[2 * p] + column + t * TILE : nothing;
            const bf16 *odd = rows[2 * p + 1] ? rows[2 * p + 1] + column + t * TILE : nothing;
            store_words(packed, (as_ints(widen16(even)) >> 16 & 0xFFFF) | as_ints(widen16(odd)));
        }
}

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

INLINE void fetch_rows(const bf16 *const *rows, int begin, int end) {
    for (int r = 0; r < KEYS; r++)
        for (int column = begin; rows[r] && column < end; column += 32) fetch(rows[r] + column);
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

static void attend(const AttentionJob &job, const Piece &piece) {
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

    const bf16 *query[QUERIES * MOST_HEADS], *weight[QUERIES * MOST_HEADS];
    memset(totals, 0, total_bytes);
    for (int q = 0; q < piece.queries; q++)
        for (int h = 0; h < piece.heads; h++) {
            const int r = q * piece.heads + h;
            const int64_t token = segment[0] + piece.first_query + q;
            query[r] = job.queries + (token * layer.heads + piece.first_head + h) * width;
            weight[r] = weights + r * KEYS;
            peak[r] = -INFINITY;
            mass[r] = 0.0f;
        }
    // So few columns are packed at a time that they stay in the first cache.
    alignas(64) uint8_t keys[KEYS * BLOCK * sizeof(bf16)], values[KEYS * GROUP * TILE * sizeof(bf16)];
    const Floats scale = all(layer.softmax_scale);
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

    // Rows past the last query may hold anything, NaN included: they are zeros here, and masked below.
    const bf16 *blocks[2][KEYS];
    rows_of_block(job.cache, table, batch.page_size, width, 0, last_position, blocks[0]);
    fetch_rows(blocks[0], 0, width);
    for (int key = 0; key <= last_position; key += KEYS) {
        const bf16 **row = blocks[key / KEYS % 2], **next = blocks[(key / KEYS + 1) % 2];
        rows_of_block(job.cache, table, batch.page_size, width, key + KEYS, last_position, next);
        memset(scores, 0, sizeof(float) * rows * KEYS);
        for (int c = 0; c < width; c += BLOCK) {
            const int end = c + BLOCK < width ? c + BLOCK : width;
            pack_keys(row, c, end, keys);
            pack_keys(row + 16, c, end, keys + 64);
            multiply_rows<MORAY_BF16>(query, rows, {KEYS / TILE, keys, KEY_STEP, nullptr, nullptr}, c, end, scores, KEYS);
            fetch_rows(next, c, end);
        }
        for (int r = 0; r < rows; r++) {
            const int seen = first_position + r / piece.heads - key + 1;  // keys of this block that the row sees
            if (seen <= 0) {
                memset(weights + r * KEYS, 0, sizeof(bf16) * KEYS);
                continue;
            }
            Floats low = load(scores + r * KEYS) * scale, high = load(scores + r * KEYS + 16) * scale;
            low = lane < seen ? low : all(-INFINITY);
            high = lane + 16 < seen ? high : all(-INFINITY);
            const float found = largest_of(larger(low, high)), old = peak[r];
            const float now = found > old ? found : old;
            low = exponential(low - all(now));
            high = exponential(high - all(now));
            if (now != old) {
                float *total = totals + static_cast<int64_t>(r) * value;
                const Floats fade = exponential(all(old - now));
                mass[r] *= fade[0];
                for (int c = 0; c < value; c += TILE) store(total + c, load(total + c) * fade);
                peak[r] = now;
            }
            mass[r] += sum_of(low + high);
            narrow16(weights + r * KEYS, low);
            narrow16(weights + r * KEYS + 16, high);
        }
        for (int c = 0; c < value; c += GROUP * TILE) {
            const int count = value - c < GROUP * TILE ? (value - c) / TILE : GROUP;
            pack_values(row, c, count, values);
            multiply_rows<MORAY_BF16>(weight, rows, {count, values, 64 * count, nullptr, nullptr}, 0, KEYS, totals + c, value);
        }
    }
    for (int r = 0; r < rows; r++) {
        const int64_t token = segment[0] + piece.first_query + r / piece.heads;
        bf16 *out = job.out + (token * layer.heads + piece.first_head + r % piece.heads) * value;
        const Floats whole = all(mass[r]);
        for (int c = 0; c < value; c += TILE) narrow16(out + c, load(totals + static_cast<int64_t>(r) * value + c) / whole);
    }
}

}  // namespace
#endif
