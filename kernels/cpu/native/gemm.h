// Rows of activations times packed matrices.
//
// The one order of every sum, whatever the batch: columns ascend in pairs within blocks of 128; each block's sum starts at zero,
// is multiplied with the block's scale and added to the total. Sixteen outputs (a tile) share a register, so nothing is ever
// summed across lanes, and how many rows or tiles are computed together changes no bit.
#ifndef MORAY_GEMM_H
#define MORAY_GEMM_H

#include "pool.h"
#include "vector.h"

namespace {

constexpr int TILE = 16;     // outputs in a register
constexpr int BLOCK = 128;   // columns that share a scale
#if defined(MORAY_ISA_AVX512)
constexpr int GROUP = 4;     // tiles computed together, by whoever takes one piece of work
constexpr int ROWS = 6;      // rows computed together: 24 sums, 6 pairs of activations and a pair of weights fill 31 registers
#else
constexpr int GROUP = 2;
constexpr int ROWS = 2;      // 4 sums of two registers each, of 16
#endif
constexpr int DIRECT = 12;   // up to so many rows weights are decoded for every ROWS of them; more: once, into memory
constexpr int ROW_BLOCK = 192;  // rows of totals held at a time: 48 KB
constexpr int AHEAD = 1024;  // bytes of a tile read ahead, of 0, 512, 1024, 2048 and 4096: 7% at 32 and more tokens on Zen 4
constexpr int PANEL = 8 * BLOCK;  // columns decoded at a time: 64 x 1024 bf16 fit the second cache beside the activations

// One of the tiles computed together, and where its outputs go.
struct Tiles {
    int count;
    const uint8_t *data[GROUP];   // of the tile's first column
    const float *scales[GROUP];   // of its row block, one for each block of columns; NULL where all are 1
};

INLINE int bytes_per_column(int kind) { return kind == MORAY_E4M3 ? TILE : kind == MORAY_BF16 ? 2 * TILE : 4 * TILE; }

INLINE const uint8_t *tile_of(const moray_matrix &m, int tile) {
    return static_cast<const uint8_t *>(m.data) + static_cast<int64_t>(tile) * m.cols * bytes_per_column(m.kind);
}

INLINE const float *scales_of(const moray_matrix &m, int tile) {
    return m.scales ? m.scales + static_cast<int64_t>(tile * TILE / BLOCK) * ((m.cols + BLOCK - 1) / BLOCK) : nullptr;
}

// totals[r][t][16] += x[r] . tile[t], columns begin to end (begin a multiple of BLOCK); data points at column `begin`.
template <int R, int T, int KIND>
INLINE void multiply(const bf16 *const *x, const Tiles &tiles, int begin, int end, float *totals, int64_t row_stride) {
    const uint8_t *at[T];
    for (int t = 0; t < T; t++) at[t] = tiles.data[t];
    for (int block = begin; block < end; block += BLOCK) {
        const int stop = block + BLOCK < end ? block + BLOCK : end;
        Floats sum[R][T];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) sum[r][t] = all(0.0f);
        if (KIND == MORAY_F32) {
            for (int k = block; k < stop; k++) {
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const Floats w = load(reinterpret_cast<const float *>(at[t]));
                    at[t] += 64;
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sum[r][t] = multiply_add(all(widen(x[r][k])), w, sum[r][t]);
                }
            }
        } else if (KIND == MORAY_BF16) {
            for (int k = block; k < stop; k += 2) {
                Pair pair[R];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) pair[r] = pair_at(x[r] + k);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const Pairs w = pairs_at(at[t]);
                    at[t] += 64;
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair[r], w);
                }
            }
        } else {
            for (int k = block; k < stop; k += 4) {
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    Pairs first, second;
                    decode(decoder, at[t], first, second);
                    __builtin_prefetch(at[t] + AHEAD);
                    at[t] += 64;
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair_at(x[r] + k), first);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair_at(x[r] + k + 2), second);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const Floats scale = all(tiles.scales[t] ? tiles.scales[t][block / BLOCK] : 1.0f);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                float *total = totals + r * row_stride + t * TILE;
                store(total, multiply_add(sum[r][t], scale, load(total)));
            }
        }
    }
}

template <int R, int KIND>
static void multiply_tiles(const bf16 *const *x, const Tiles &tiles, int begin, int end, float *totals, int64_t row_stride) {
    switch (tiles.count) {
#if defined(MORAY_ISA_AVX512)
        case 4: return multiply<R, 4, KIND>(x, tiles, begin, end, totals, row_stride);
        case 3: return multiply<R, 3, KIND>(x, tiles, begin, end, totals, row_stride);
#endif
        case 2: return multiply<R, 2, KIND>(x, tiles, begin, end, totals, row_stride);
        case 1: return multiply<R, 1, KIND>(x, tiles, begin, end, totals, row_stride);
    }
}

// The same for any number of rows.
template <int KIND>
static void multiply_rows(const bf16 *const *x, int rows, const Tiles &tiles, int begin, int end, float *totals,
                          int64_t row_stride) {
    while (rows > 0) {
        // The last two parts are even: one of a single row would use a sixth of the machine.
        const int now = rows <= ROWS ? rows : rows < 2 * ROWS ? (rows + 1) / 2 : ROWS;
        switch (now) {
#if defined(MORAY_ISA_AVX512)
            case 6: multiply_tiles<6, KIND>(x, tiles, begin, end, totals, row_stride); break;
            case 5: multiply_tiles<5, KIND>(x, tiles, begin, end, totals, row_stride); break;
            case 4: multiply_tiles<4, KIND>(x, tiles, begin, end, totals, row_stride); break;
            case 3: multiply_tiles<3, KIND>(x, tiles, begin, end, totals, row_stride); break;
#endif
            case 2: multiply_tiles<2, KIND>(x, tiles, begin, end, totals, row_stride); break;
            case 1: multiply_tiles<1, KIND>(x, tiles, begin, end, totals, row_stride); break;
        }
        x += now;
        totals += now * row_stride;
        rows -= now;
    }
}

// Columns begin to end of each tile as bf16, into `decoded`; e4m3 alone.
INLINE Tiles decoded_tiles(const Tiles &tiles, int begin, int end, uint8_t *decoded) {
    Tiles result = tiles;
    for (int t = 0; t < tiles.count; t++) {
        const uint8_t *at = tiles.data[t] + static_cast<int64_t>(begin) * TILE;
        uint8_t *to = decoded + static_cast<int64_t>(t) * PANEL * 2 * TILE;
        result.data[t] = to;
        for (int k = begin; k < end; k += 4, at += 64, to += 128) {
            Pairs first, second;
            decode(decoder, at, first, second);
            store_pairs(to, first);
            store_pairs(to + 64, second);
        }
    }
    return result;
}

// totals[r][t][16] = x[r] . tile[t] over all `cols` columns, for at most ROW_BLOCK rows.
static void product(const bf16 *const *x, int rows, const Tiles &tiles, int kind, int cols, float *totals,
                    int64_t row_stride) {
    for (int r = 0; r < rows; r++) memset(totals + r * row_stride, 0, sizeof(float) * TILE * tiles.count);
    if (kind == MORAY_F32) return multiply_rows<MORAY_F32>(x, rows, tiles, 0, cols, totals, row_stride);
    if (kind == MORAY_BF16) return multiply_rows<MORAY_BF16>(x, rows, tiles, 0, cols, totals, row_stride);
    if (rows <= DIRECT) return multiply_rows<MORAY_E4M3>(x, rows, tiles, 0, cols, totals, row_stride);
    uint8_t *decoded = static_cast<uint8_t *>(moray::scratch(moray::DECODED, sizeof(bf16) * PANEL * TILE * GROUP));
    for (int begin = 0; begin < cols; begin += PANEL) {
        const int end = begin + PANEL < cols ? begin + PANEL : cols;
        multiply_rows<MORAY_BF16>(x, rows, decoded_tiles(tiles, begin, end, decoded), begin, end, totals, row_stride);
    }
}

// Tiles `first` to `first + count` of a matrix.
INLINE Tiles tiles_of(const moray_matrix &m, int first, int count) {
    Tiles tiles;
    tiles.count = count;
    for (int t = 0; t < count; t++) {
        tiles.data[t] = tile_of(m, first + t);
        tiles.scales[t] = scales_of(m, first + t);
    }
    return tiles;
}

INLINE int tiles_in(const moray_matrix &m) { return (m.rows + TILE - 1) / TILE; }
INLINE int groups_in(const moray_matrix &m) { return (tiles_in(m) + GROUP - 1) / GROUP; }

// One group of tiles of a matrix for all rows; `keep(row, first output, outputs, totals)` takes what came out.
template <typename Row, typename Keep>
INLINE void multiply_group(const moray_matrix &m, int group, int rows, Row row_at, Keep keep) {
    const int first = group * GROUP;
    const int count = tiles_in(m) - first < GROUP ? tiles_in(m) - first : GROUP;
    const int outputs = m.rows - first * TILE < count * TILE ? m.rows - first * TILE : count * TILE;
    const Tiles tiles = tiles_of(m, first, count);
    float *totals = static_cast<float *>(moray::scratch(moray::TOTALS, sizeof(float) * ROW_BLOCK * GROUP * TILE));
    const bf16 *x[ROW_BLOCK];
    for (int begin = 0; begin < rows; begin += ROW_BLOCK) {
        const int now = rows - begin < ROW_BLOCK ? rows - begin : ROW_BLOCK;
        for (int r = 0; r < now; r++) x[r] = row_at(begin + r);
        product(x, now, tiles, m.kind, m.cols, totals, GROUP * TILE);
        for (int r = 0; r < now; r++) keep(begin + r, first * TILE, outputs, totals + r * GROUP * TILE);
    }
}

INLINE void keep_bf16(bf16 *to, const float *from, int count) {
    int i = 0;
    for (; i + TILE <= count; i += TILE) narrow16(to + i, load(from + i));
    for (; i < count; i++) to[i] = narrow(from[i]);
}

// out [rows, m.rows] = x [rows, stride] times m, the region's threads taking groups of tiles in turn; groups_in(m) pieces.
INLINE void linear(const moray_matrix &m, const bf16 *x, int64_t x_stride, int rows, bf16 *out, int64_t out_stride,
                   moray::Stage &stage) {
    moray::share(stage, groups_in(m), [&](int group) {
        multiply_group(
            m, group, rows, [&](int r) { return x + r * x_stride; },
            [&](int r, int first, int outputs, const float *totals) {
                keep_bf16(out + r * out_stride + first, totals, outputs);
            });
    });
}

}  // namespace
#endif
