// Products of fp32, for machines that cannot multiply bf16: activations are widened for each block of columns, and weights where
// they are used or, for many rows, once for all of them. Both are exact.
#ifndef MORAY_PRODUCTS_F32_H
#define MORAY_PRODUCTS_F32_H

#include "tiles.h"

namespace {

constexpr int STRIPS = TILE / LANES;  // registers that a tile's outputs take
constexpr int STRIP = 4 * LANES;      // bytes of a packed line of 64 that belong to one of them

// Rows computed together: 12 sums, 2 registers of weights, and one of a row's; where weights are decoded, fewer are left. With
// AVX512 twice as many of each, since there are 32 registers.
template <int KIND>
constexpr int ROWS = KIND == MORAY_E4M3 ? 5 : 6;
constexpr int DIRECT = 7;  // up to so many rows codes are decoded where they are used; for more, once, into the first cache

// Columns in a packed line.
template <int KIND>
constexpr int LINE = KIND == MORAY_E4M3 ? 4 : KIND == MORAY_BF16 ? 2 : 1;

// Two columns of a strip of a packed line, as bf16; of e4m3 1 / (CODES_BY_ACTIVATION CODES_BY_SCALE) of the weights.
template <int KIND, int PAIR>
INLINE Ints pair_at(const uint8_t *at) {
    return KIND == MORAY_E4M3 ? decoded_pair<PAIR>(at) : load_words(at);
}
template <int KIND>
INLINE Floats even(Ints pair) {
    return as_floats(KIND == MORAY_E4M3 ? pair << 16 & BITS_OF_CODE : pair << 16);
}
template <int KIND>
INLINE Floats odd(Ints pair) {
    return as_floats(pair & (KIND == MORAY_E4M3 ? BITS_OF_CODE : static_cast<int32_t>(0xFFFF0000)));
}

// sum[r][v] += x[r] w[v] of one column; x [R, BLOCK].
template <int R, int V>
INLINE void multiply_column(const float *x, const Floats *w, Floats (*sum)[V]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const Floats each = all(x[r * BLOCK]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) accumulate(sum[r][v], each, w[v]);
    }
}

// The same of the columns in a packed line, from its pair P on.
template <int R, int V, int KIND, int P = 0>
INLINE void multiply_line(const float *x, const uint8_t *at, Floats (*sum)[V]) {
    Floats w[V];
    if constexpr (KIND == MORAY_F32) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) w[v] = as_floats(load_words(at + STRIP * v));
        multiply_column<R, V>(x, w, sum);
    } else if constexpr (2 * P < LINE<KIND>) {
        if constexpr (R <= 2) {  // many strips: each at once, or there are more weights than registers
            Floats first[R], second[R];
            for (int r = 0; r < R; r++) first[r] = all(x[r * BLOCK]), second[r] = all(x[r * BLOCK + 1]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                const Ints pair = pair_at<KIND, P>(at + STRIP * v);
                for (int r = 0; r < R; r++) accumulate(sum[r][v], first[r], even<KIND>(pair));
                for (int r = 0; r < R; r++) accumulate(sum[r][v], second[r], odd<KIND>(pair));
            }
        } else {
            Ints pair[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) w[v] = even<KIND>(pair[v] = pair_at<KIND, P>(at + STRIP * v));
            multiply_column<R, V>(x, w, sum);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) w[v] = odd<KIND>(pair[v]);
            multiply_column<R, V>(x + 1, w, sum);
        }
        multiply_line<R, V, KIND, P + 1>(x + 2, at, sum);
    }
}

// A block of at most BLOCK columns of some tiles that lie side by side.
struct Columns {
    const uint8_t *data;  // of the first tile
    int64_t step;         // bytes from one line of a tile to its next
    int count;
    float scale;
    const uint8_t *ahead;  // what to fetch meanwhile, laid out like `data`; NULL: nothing
};

// totals[r][strip] += scale x[r] . w[strip], of R rows of x [R, BLOCK] and V strips. Never inlined: beside what is around it,
// compilers keep some of the sums in memory.
template <int R, int V, int KIND>
static __attribute__((noinline)) void multiply(const float *x, const Columns &columns, float *totals, int64_t row_stride) {
    Floats sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = all(0.0f);
    const uint8_t *at = columns.data, *ahead = columns.ahead;
    const int64_t ahead_step = ahead ? columns.step : 0;
    if (!ahead) ahead = at;
    for (int k = 0; k < columns.count; k += LINE<KIND>, at += columns.step, ahead += ahead_step) {
        if (KIND != MORAY_F32)
#pragma GCC unroll 4
            for (int line = 0; line < V * STRIP / 64; line++) fetch(ahead + 64 * line);
        multiply_line<R, V, KIND>(x + k, at, sum);
    }
    const Floats scale = all(columns.scale);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float *total = totals + r * row_stride + v * LANES;
            store(total, multiply_add(sum[r][v], scale, load(total)));
        }
}

// Tiles that R rows are multiplied with at once: so many that their sums, each a chain, keep the multipliers busy, and that they
// fit the registers. (AVX512: one at a time took 1.4 times as long for many rows, on Zen 4.)
template <int R>
constexpr int WIDE = LANES < 8 ? 1 : LANES == 16 || R == 1 ? 4 : R == 2 ? 2 : 1;

template <int R, int KIND, int TILES = WIDE<R>>
static void multiply_tiles(const float *x, Columns columns, int tiles, float *totals, int64_t row_stride) {
    for (; tiles >= TILES; tiles -= TILES, totals += TILES * TILE) {
        multiply<R, TILES * STRIPS, KIND>(x, columns, totals, row_stride);
        columns.data += 64 * TILES;
        if (columns.ahead) columns.ahead += 64 * TILES;
    }
    if constexpr (TILES > 1)
        if (tiles) multiply_tiles<R, KIND, TILES / 2>(x, columns, tiles, totals, row_stride);
}

// The same for any number of rows.
template <int KIND>
static void multiply_rows(const float *x, int rows, const Columns &columns, int tiles, float *totals, int64_t row_stride) {
    while (rows > 0) {
        // The last two parts are even: one of a single row would use a sixth of the machine.
        const int now = rows <= ROWS<KIND> ? rows : rows < 2 * ROWS<KIND> ? (rows + 1) / 2 : ROWS<KIND>;
        switch (now) {
            case 6:
                if constexpr (ROWS<KIND> >= 6) multiply_tiles<6, KIND>(x, columns, tiles, totals, row_stride);
                break;
            case 5: multiply_tiles<5, KIND>(x, columns, tiles, totals, row_stride); break;
            case 4: multiply_tiles<4, KIND>(x, columns, tiles, totals, row_stride); break;
            case 3: multiply_tiles<3, KIND>(x, columns, tiles, totals, row_stride); break;
            case 2: multiply_tiles<2, KIND>(x, columns, tiles, totals, row_stride); break;
            case 1: multiply_tiles<1, KIND>(x, columns, tiles, totals, row_stride); break;
        }
        x += now * BLOCK;
        totals += now * row_stride;
        rows -= now;
    }
}

// wide [rows, BLOCK]: columns begin to end of x, times a power of two.
INLINE void widen_rows(const bf16 *const *x, int rows, int begin, int end, float power, float *wide) {
    for (int r = 0; r < rows; r++, wide += BLOCK) {
        const bf16 *from = x[r] + begin;
        const int count = end - begin;
        int i = 0;
        for (; i + LANES <= count; i += LANES) store(wide + i, widen_at(from + i) * all(power));
        for (; i < count; i++) wide[i] = widen(from[i]) * power;
    }
}

// Tiles whose codes are decoded together: those that many rows are multiplied with at once.
constexpr int DECODED = WIDE<6>;

// The columns of some tiles as bf16 into `decoded`: two columns of each of them, the next two, and so on.
template <int TILES>
INLINE void decode_tiles(const Columns &columns, uint8_t *decoded) {
    constexpr int32_t BITS = BITS_OF_CODE | static_cast<int32_t>(static_cast<uint32_t>(BITS_OF_CODE) >> 16);
    const uint8_t *at = columns.data, *ahead = columns.ahead ? columns.ahead : at;
    for (int k = 0; k < columns.count; k += 4, at += columns.step, ahead += columns.step, decoded += 128 * TILES)
#pragma GCC unroll 4
        for (int tile = 0; tile < 64 * TILES; tile += 64) {
            fetch(ahead + tile);
#pragma GCC unroll 4
            for (int strip = tile; strip < tile + 64; strip += STRIP) {
                store_words(decoded + strip, decoded_pair<0>(at + strip) & BITS);
                store_words(decoded + 64 * TILES + strip, decoded_pair<1>(at + strip) & BITS);
            }
        }
}

// totals[r][t][16] += scale x[r] . tile[t] of codes, over a block of columns; x [rows, BLOCK].
template <int TILES = DECODED>
static void multiply_codes(const float *x, int rows, Columns columns, int tiles, float *totals, int64_t row_stride) {
    if (rows <= DIRECT) return multiply_rows<MORAY_E4M3>(x, rows, columns, tiles, totals, row_stride);
    alignas(64) uint8_t decoded[sizeof(bf16) * BLOCK * TILE * TILES];
    for (; tiles >= TILES; tiles -= TILES, columns.data += 64 * TILES, totals += TILE * TILES) {
        decode_tiles<TILES>(columns, decoded);
        if (columns.ahead) columns.ahead += 64 * TILES;
        multiply_rows<MORAY_BF16>(x, rows, {decoded, 64 * TILES, columns.count, columns.scale, nullptr}, TILES, totals, row_stride);
    }
    if constexpr (TILES > 1)
        if (tiles) multiply_codes<TILES / 2>(x, rows, columns, tiles, totals, row_stride);
}

// totals[r][t][16] = x[r] . tile[t] over all `cols` columns, for at most ROW_BLOCK rows.
static void product(const bf16 *const *x, int rows, const Tiles &tiles, int kind, int cols, float *totals,
                    int64_t row_stride) {
    alignas(64) float wide[ROW_BLOCK * BLOCK];
    for (int r = 0; r < rows; r++) memset(totals + r * row_stride, 0, sizeof(float) * TILE * tiles.count);
    const int64_t bytes = tiles.step * BLOCK / (kind == MORAY_E4M3 ? 4 : kind == MORAY_BF16 ? 2 : 1);
    Columns columns = {tiles.data, tiles.step, 0, 1.0f, nullptr};
    for (int begin = 0; begin < cols; begin += BLOCK, columns.data += bytes) {
        const int end = begin + BLOCK < cols ? begin + BLOCK : cols;
        columns.count = end - begin;
        if (kind == MORAY_E4M3) columns.scale = tiles.scales[begin / BLOCK] * CODES_BY_SCALE;
        columns.ahead = ahead_of(tiles, columns.data, bytes, end < cols);
        widen_rows(x, rows, begin, end, kind == MORAY_E4M3 ? CODES_BY_ACTIVATION : 1.0f, wide);
        switch (kind) {
            case MORAY_E4M3: multiply_codes(wide, rows, columns, tiles.count, totals, row_stride); break;
            case MORAY_BF16: multiply_rows<MORAY_BF16>(wide, rows, columns, tiles.count, totals, row_stride); break;
            case MORAY_F32: multiply_rows<MORAY_F32>(wide, rows, columns, tiles.count, totals, row_stride); break;
        }
    }
}

// totals[r][t][16] += x[r] . tile[t], columns begin to end of x, at most BLOCK, of tiles of bf16 that were packed just now.
static void multiply_packed(const bf16 *const *x, int rows, int tiles, const uint8_t *packed, int begin, int end, float *totals,
                            int64_t row_stride, Prefetch ahead) {
    alignas(64) float wide[ROW_BLOCK * BLOCK];
    fetch(ahead);
    widen_rows(x, rows, begin, end, 1.0f, wide);
    multiply_rows<MORAY_BF16>(wide, rows, {packed, 64 * tiles, end - begin, 1.0f, nullptr}, tiles, totals, row_stride);
}

}  // namespace
#endif
