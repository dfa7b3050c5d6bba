// Products of pairs of bf16, where a machine has them: two columns of sixteen outputs at a time, in the order of the columns.
#ifndef MORAY_PRODUCTS_BF16_H
#define MORAY_PRODUCTS_BF16_H

#include <type_traits>

#include "tiles.h"

namespace {

constexpr int ROWS = 6;  // rows computed together: 24 sums, 6 pairs of activations and a pair of weights fill 31 registers
constexpr int ROWS_OF_TWO = 10;  // the same of two tiles, as keys are: with 12 sums, the next product waits for each of them
constexpr int DIRECT = 10;  // up to so many rows weights are decoded for every ROWS of them; more: once, into memory
constexpr int PANEL = BLOCK;  // columns computed for all rows at a time, if those are many: 16 KB of bf16, in the first cache

// totals[r][t][16] += x[r] . tile[t], columns begin to end (begin a multiple of BLOCK); data points at column `begin`. Of e4m3
// what follows is fetched meanwhile; of bf16 `each` lines for every two columns, from `later` on.
template <int R, int T, int KIND>
INLINE void multiply(const bf16 *const *x, const Tiles &tiles, int begin, int end, float *totals, int64_t row_stride,
                     const uint8_t *later, int each) {
    const uint8_t *at = tiles.data;
    const int64_t step = tiles.step;
    for (int block = begin; block < end; block += BLOCK) {
        const int stop = block + BLOCK < end ? block + BLOCK : end;
        Floats sum[R][T];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                sum[r][t] = all(0.0f);
                // Of many rows they are in the second cache, and would be waited for at the block's end.
                if (R > 3) __builtin_prefetch(totals + r * row_stride + t * TILE);
            }
        if (KIND == MORAY_F32) {
            for (int k = block; k < stop; k++, at += step) {
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const Floats w = load(reinterpret_cast<const float *>(at + 64 * t));
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sum[r][t] = multiply_add(all(widen(x[r][k])), w, sum[r][t]);
                }
            }
        } else if (KIND == MORAY_BF16) {
            const auto columns = [&](auto lines) __attribute__((always_inline)) {
                for (int k = block; k < stop; k += 2, at += step, later += 64 * lines) {
                    Pair pair[R];
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) pair[r] = pair_at(x[r] + k);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        const Pairs w = pairs_at(at + 64 * t);
                        if (t < lines) fetch(later + 64 * t);
#pragma GCC unroll 16
                        for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair[r], w);
                    }
                }
            };
            switch (each) {
                case 0: columns(std::integral_constant<int, 0>{}); break;
                case 1: columns(std::integral_constant<int, 1>{}); break;
                case 2: columns(std::integral_constant<int, 2>{}); break;
                default: columns(std::integral_constant<int, GROUP>{}); break;
            }
        } else {
            const uint8_t *ahead = ahead_of(tiles, at, step * (BLOCK / 4), stop < end);
            for (int k = block; k < stop; k += 4, at += step, ahead += step) {
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    Pairs first, second;
                    decode(decoder, at + 64 * t, first, second);
                    fetch(ahead + 64 * t);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair_at(x[r] + k), first);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair_at(x[r] + k + 2), second);
                }
            }
        }
        const Floats scale = all(tiles.scales ? tiles.scales[block / BLOCK] : 1.0f);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                float *total = totals + r * row_stride + t * TILE;
                store(total, multiply_add(sum[r][t], scale, load(total)));
            }
        }
    }
}

// For `rows` rows, at most R.
template <int R, int T, int KIND>
static void multiply_some(const bf16 *const *x, int rows, const Tiles &tiles, int begin, int end, float *totals,
                          int64_t row_stride, const uint8_t *later, int each) {
    if (rows == R) return multiply<R, T, KIND>(x, tiles, begin, end, totals, row_stride, later, each);
    if constexpr (R > 1) multiply_some<R - 1, T, KIND>(x, rows, tiles, begin, end, totals, row_stride, later, each);
}

// The same for any number of rows. `ahead` is fetched while bf16 is multiplied, but for a single row, for which the machine reads
// ahead well enough by itself.
template <int KIND>
static void multiply_rows(const bf16 *const *x, int rows, const Tiles &tiles, int begin, int end, float *totals,
                          int64_t row_stride, Prefetch ahead = {nullptr, 0}) {
    constexpr int OF_TWO = KIND == MORAY_BF16 ? ROWS_OF_TWO : ROWS;
    const int most = tiles.count == 2 ? OF_TWO : ROWS;
    int parts = (rows + most - 1) / most;
    const int steps = (end - begin) / 2, places = parts * steps;
    const int each = rows == 1 ? 0 : (ahead.lines + places - 1) / places;
    for (; parts > 0; parts--) {
        const int fetching = ahead.lines > 0 ? each : 0;
        // The last two parts are even: one of a single row would use a sixth of the machine.
        const int now = parts > 2 ? most : (rows + parts - 1) / parts;
        switch (tiles.count) {
            case 4: multiply_some<ROWS, 4, KIND>(x, now, tiles, begin, end, totals, row_stride, ahead.at, fetching); break;
            case 3: multiply_some<ROWS, 3, KIND>(x, now, tiles, begin, end, totals, row_stride, ahead.at, fetching); break;
            case 2: multiply_some<OF_TWO, 2, KIND>(x, now, tiles, begin, end, totals, row_stride, ahead.at, fetching); break;
            case 1: multiply_some<ROWS, 1, KIND>(x, now, tiles, begin, end, totals, row_stride, ahead.at, fetching); break;
        }
        x += now;
        totals += now * row_stride;
        rows -= now;
        ahead = {ahead.at + 64 * steps * fetching, ahead.lines - steps * fetching};
    }
}

// Columns begin to end as bf16, into `decoded`; e4m3 alone.
INLINE Tiles decoded_tiles(const Tiles &tiles, int begin, int end, uint8_t *decoded) {
    Tiles result = {tiles.count, decoded, 64 * tiles.count, tiles.scales, nullptr};
    const uint8_t *at = tiles.data;
    for (int k = begin; k < end; k += 4, at += tiles.step, decoded += 2 * result.step)
        for (int t = 0; t < tiles.count; t++) {
            Pairs first, second;
            decode(decoder, at + 64 * t, first, second);
            store_pairs(decoded + 64 * t, first);
            store_pairs(decoded + result.step + 64 * t, second);
        }
    return result;
}

#if !defined(MORAY_ISA_AMX)  // which has tiles for these, and takes the rest from here

// totals[r][t][16] = x[r] . tile[t] over all `cols` columns, for at most ROW_BLOCK rows.
static void product(const bf16 *const *x, int rows, const Tiles &tiles, int kind, int cols, float *totals,
                    int64_t row_stride) {
    for (int r = 0; r < rows; r++) memset(totals + r * row_stride, 0, sizeof(float) * TILE * tiles.count);
    if (kind == MORAY_F32) return multiply_rows<MORAY_F32>(x, rows, tiles, 0, cols, totals, row_stride);
    if (kind == MORAY_E4M3 && rows <= ROWS) return multiply_rows<MORAY_E4M3>(x, rows, tiles, 0, cols, totals, row_stride);
    // All rows of a panel before the next one: it stays in the first cache meanwhile.
    const int64_t bytes = tiles.step * (PANEL / (kind == MORAY_BF16 ? 2 : 4));
    Tiles panel = tiles;
    for (int begin = 0; begin < cols; begin += PANEL, panel.data += bytes) {
        const int end = begin + PANEL < cols ? begin + PANEL : cols;
        panel.next = end < cols ? panel.data + bytes : tiles.next;
        if (kind == MORAY_E4M3 && rows <= DIRECT) {
            multiply_rows<MORAY_E4M3>(x, rows, panel, begin, end, totals, row_stride);
            continue;
        }
        const Prefetch ahead = {panel.next, panel.next ? static_cast<int>(bytes / 64) : 0};
        alignas(64) uint8_t decoded[sizeof(bf16) * PANEL * TILE * GROUP];
        multiply_rows<MORAY_BF16>(x, rows, kind == MORAY_BF16 ? panel : decoded_tiles(panel, begin, end, decoded), begin, end,
                                  totals, row_stride, ahead);
    }
}

// totals[r][t][16] += x[r] . tile[t], columns begin to end of x, of tiles of bf16 that were packed just now.
static void multiply_packed(const bf16 *const *x, int rows, int tiles, const uint8_t *packed, int begin, int end, float *totals,
                            int64_t row_stride, Prefetch ahead) {
    multiply_rows<MORAY_BF16>(x, rows, {tiles, packed, 64 * tiles, nullptr, nullptr}, begin, end, totals, row_stride, ahead);
}

#endif

}  // namespace
#endif
