// Rows of activations times packed matrices.
//
// The one order of every sum, whatever the batch: columns ascend in pairs within blocks of 128; each block's sum starts at zero,
// is multiplied with the block's scale and added to the total. Sixteen outputs (a tile) share a register, so nothing is ever
// summed across lanes, and how many rows or tiles are computed together changes no bit.
#ifndef MORAY_GEMM_H
#define MORAY_GEMM_H

#include <type_traits>

#include "pool.h"
#include "vector.h"

namespace {

constexpr int TILE = MORAY_TILE;    // outputs in a register
constexpr int GROUP = MORAY_GROUP;  // tiles packed together, and computed by whoever takes one piece of work
constexpr int BLOCK = 128;          // columns that share a scale, and rows that do: those of a group all do
static_assert(BLOCK % (GROUP * TILE) == 0, "tiles of a group share their scales");
#if defined(MORAY_ISA_AVX512)
constexpr int WIDE = 4;      // tiles computed together
constexpr int ROWS = 6;      // rows computed together: 24 sums, 6 pairs of activations and a pair of weights fill 31 registers
// From LEAST_TALL rows up to MOST_TALL, one tile for TALL rows at a time: as many products for each weight that is
// decoded, which happens in other units meanwhile. Experts with 12 to 20 rows each take 0.90-0.92 of the time so, on Zen 4;
// 16 rows at a time, which lie 2 KB from each other, are too many for the first cache.
constexpr int LEAST_TALL = 9;
constexpr int TALL = 14;
constexpr int MOST_TALL = 28;
#else
constexpr int WIDE = 2;
constexpr int ROWS = 2;      // 4 sums of two registers each, of 16
#endif
constexpr int DIRECT = 12;   // up to so many rows weights are decoded for every ROWS of them; more: once, into memory,
                             // unless TALL ones are computed together
constexpr int ROW_BLOCK = 192;  // rows of totals held at a time: 48 KB
constexpr int PANEL = BLOCK;  // columns computed for all rows at a time, if those are many: 16 KB of bf16, in the first cache

// Tiles computed one beside the other: all of a packed group, or some that are neighbours in it.
struct Tiles {
    int count;
    const uint8_t *data;   // of the first tile's first column; each tile's lies 64 bytes after the one before
    int64_t step;          // bytes from one lot of columns to the next
    const float *scales;   // one for each block of columns, the same for the whole group; NULL where all are 1
    const uint8_t *next;   // what is read after these, for the caches to fetch while the last columns are computed; NULL for
                           // tiles that are in the caches already
};

// Bytes that hold `columns` columns of a group of one tile.
INLINE int64_t bytes_of_columns(int kind, int64_t columns) {
    return columns * (kind == MORAY_E4M3 ? TILE : kind == MORAY_BF16 ? 2 * TILE : 4 * TILE);
}

INLINE int tiles_in(const moray_matrix &m) { return (m.rows + TILE - 1) / TILE; }
INLINE int groups_in(const moray_matrix &m) { return (tiles_in(m) + GROUP - 1) / GROUP; }

// At most `most` tiles of a matrix from `first` on, up to the end of the group that it is in.
INLINE Tiles tiles_of(const moray_matrix &m, int first, int most) {
    const int group = first / GROUP, offset = first % GROUP;
    const int whole = tiles_in(m) - group * GROUP < GROUP ? tiles_in(m) - group * GROUP : GROUP;
    Tiles tiles;
    tiles.count = whole - offset < most ? whole - offset : most;
    tiles.data = static_cast<const uint8_t *>(m.data) + group * GROUP * bytes_of_columns(m.kind, m.cols) + 64 * offset;
    tiles.step = 64 * whole;
    tiles.scales = m.scales ? m.scales + static_cast<int64_t>(first * TILE / BLOCK) * ((m.cols + BLOCK - 1) / BLOCK) : nullptr;
    tiles.next = tiles.data;  // until somebody knows better
    return tiles;
}

INLINE const uint8_t *start_of(const moray_matrix &m, int group) { return tiles_of(m, group * GROUP, GROUP).data; }

// What to fetch while a block of `bytes` is computed: the next one (8 KB of four tiles of e4m3, 16 KB of bf16), or after the
// last what is read next. Twice and four times as far ahead are the same within noise.
INLINE const uint8_t *ahead_of(const Tiles &tiles, const uint8_t *block, int64_t bytes, bool more) {
    return !tiles.next ? block : more ? block + bytes : tiles.next;
}

// Into the second cache: the first can wait for few lines at a time. Where they were asked for there, one token's experts and
// attention took 1.1 times as long (Zen 4).
INLINE void fetch(const void *line) { __builtin_prefetch(line, 0, 2); }

// totals[r][t][16] += x[r] . tile[t], columns begin to end (begin a multiple of BLOCK); data points at column `begin`.
template <int R, int T, int KIND>
INLINE void multiply(const bf16 *const *x, const Tiles &tiles, int begin, int end, float *totals, int64_t row_stride) {
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
            const auto columns = [&](auto fetching) __attribute__((always_inline)) {
                const uint8_t *ahead = ahead_of(tiles, at, step * (BLOCK / 2), stop < end);
                for (int k = block; k < stop; k += 2, at += step, ahead += step) {
                    Pair pair[R];
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) pair[r] = pair_at(x[r] + k);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        const Pairs w = pairs_at(at + 64 * t);
                        if (fetching) fetch(ahead + 64 * t);
#pragma GCC unroll 8
                        for (int r = 0; r < R; r++) sum[r][t] = dot(sum[r][t], pair[r], w);
                    }
                }
            };
            // What is in the caches is not fetched, and for a single row the machine reads ahead well enough by itself.
            if (R > 1 && tiles.next)
                columns(std::true_type{});
            else
                columns(std::false_type{});
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
    if (tiles.count > WIDE) {
        Tiles some = tiles;
        for (int t = 0; t < tiles.count; t += WIDE, some.data += 64 * WIDE) {
            some.count = tiles.count - t < WIDE ? tiles.count - t : WIDE;
            multiply_rows<KIND>(x, rows, some, begin, end, totals + t * TILE, row_stride);
        }
        return;
    }
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

#if defined(MORAY_ISA_AVX512)
// One tile of e4m3 for R rows or fewer.
template <int R>
static void multiply_tall(const bf16 *const *x, int rows, const Tiles &tile, int begin, int end, float *totals,
                          int64_t row_stride) {
    if (rows == R) return multiply<R, 1, MORAY_E4M3>(x, tile, begin, end, totals, row_stride);
    if constexpr (R > 1) multiply_tall<R - 1>(x, rows, tile, begin, end, totals, row_stride);
}
#endif

// Columns begin to end as bf16, into `decoded`; e4m3 alone.
INLINE Tiles decoded_tiles(const Tiles &tiles, int begin, int end, uint8_t *decoded) {
    Tiles result = {tiles.count, decoded, 64 * tiles.count, tiles.scales, nullptr};
    const uint8_t *at = tiles.data;
    for (int block = begin; block < end; block += BLOCK) {
        const int stop = block + BLOCK < end ? block + BLOCK : end;
        const uint8_t *ahead = ahead_of(tiles, at, tiles.step * (BLOCK / 4), stop < end);
        for (int k = block; k < stop; k += 4, at += tiles.step, ahead += tiles.step, decoded += 2 * result.step)
            for (int t = 0; t < tiles.count; t++) {
                Pairs first, second;
                decode(decoder, at + 64 * t, first, second);
                fetch(ahead + 64 * t);
                store_pairs(decoded + 64 * t, first);
                store_pairs(decoded + result.step + 64 * t, second);
            }
    }
    return result;
}

// totals[r][t][16] = x[r] . tile[t] over all `cols` columns, for at most ROW_BLOCK rows.
static void product(const bf16 *const *x, int rows, const Tiles &tiles, int kind, int cols, float *totals,
                    int64_t row_stride) {
    for (int r = 0; r < rows; r++) memset(totals + r * row_stride, 0, sizeof(float) * TILE * tiles.count);
    if (kind == MORAY_F32) return multiply_rows<MORAY_F32>(x, rows, tiles, 0, cols, totals, row_stride);
    // All rows of a panel before the next one: it stays in the first cache meanwhile.
    const int columns = rows <= ROWS ? cols : PANEL;
    const int64_t bytes = tiles.step * (PANEL / (kind == MORAY_BF16 ? 2 : 4));
    Tiles panel = tiles;
    for (int begin = 0; begin < cols; begin += columns, panel.data += bytes) {
        const int end = begin + columns < cols ? begin + columns : cols;
        panel.next = end < cols ? panel.data + bytes : tiles.next;
        if (kind == MORAY_BF16) {
            multiply_rows<MORAY_BF16>(x, rows, panel, begin, end, totals, row_stride);
#if defined(MORAY_ISA_AVX512)
        } else if (rows >= LEAST_TALL && rows <= MOST_TALL) {
            Tiles tile = panel;
            tile.count = 1;
            for (int t = 0; t < panel.count; t++, tile.data += 64, tile.next += 64)
                for (int at = 0, parts = (rows + TALL - 1) / TALL, now; at < rows; at += now, parts--) {
                    now = (rows - at + parts - 1) / parts;
                    multiply_tall<TALL>(x + at, now, tile, begin, end, totals + at * row_stride + t * TILE, row_stride);
                }
#endif
        } else if (rows <= DIRECT) {
            multiply_rows<MORAY_E4M3>(x, rows, panel, begin, end, totals, row_stride);
        } else {
            alignas(64) uint8_t decoded[sizeof(bf16) * PANEL * TILE * GROUP];
            multiply_rows<MORAY_BF16>(x, rows, decoded_tiles(panel, begin, end, decoded), begin, end, totals, row_stride);
        }
    }
}

// The same for `count` tiles of a matrix from `first` on, which may be of several groups.
static void product_of(const bf16 *const *x, int rows, const moray_matrix &m, int first, int count, const uint8_t *next,
                       float *totals, int64_t row_stride) {
    while (count > 0) {
        Tiles tiles = tiles_of(m, first, count);
        if (next) tiles.next = next;
        product(x, rows, tiles, m.kind, m.cols, totals, row_stride);
        first += tiles.count;
        count -= tiles.count;
        totals += tiles.count * TILE;
    }
}

// `tiles` of a matrix from tile `first` on, for all rows; `keep(row, first output, outputs, totals)` takes what came out.
template <typename Row, typename Keep>
INLINE void multiply_part(const moray_matrix &m, int first, const Tiles &tiles, int rows, Row row_at, Keep keep) {
    const int outputs = m.rows - first * TILE < tiles.count * TILE ? m.rows - first * TILE : tiles.count * TILE;
    float *totals = static_cast<float *>(moray::scratch(moray::TOTALS, sizeof(float) * ROW_BLOCK * 2 * GROUP * TILE));
    const bf16 *x[ROW_BLOCK];
    for (int begin = 0; begin < rows; begin += ROW_BLOCK) {
        const int now = rows - begin < ROW_BLOCK ? rows - begin : ROW_BLOCK;
        for (int r = 0; r < now; r++) x[r] = row_at(begin + r);
        product(x, now, tiles, m.kind, m.cols, totals, GROUP * TILE);
        for (int r = 0; r < now; r++) keep(begin + r, first * TILE, outputs, totals + r * GROUP * TILE);
    }
}

// The same of a whole group.
template <typename Row, typename Keep>
INLINE void multiply_group(const moray_matrix &m, int group, int rows, Row row_at, Keep keep, const uint8_t *next = nullptr) {
    Tiles tiles = tiles_of(m, group * GROUP, GROUP);
    if (next || group + 1 < groups_in(m)) tiles.next = next ? next : start_of(m, group + 1);
    multiply_part(m, group * GROUP, tiles, rows, row_at, keep);
}

// What `most` tiles of a matrix read from `first` on, up to the end of their group.
INLINE moray::Ahead tiles_ahead(const moray_matrix &m, int first, int most) {
    const Tiles tiles = tiles_of(m, first, most);
    return {tiles.data, static_cast<int32_t>(bytes_of_columns(m.kind, m.cols) / 64), 64 * tiles.count, tiles.step};
}

// What `count` groups read from `group` on, which lies together: as much as half the second cache holds.
INLINE moray::Ahead groups_ahead(const moray_matrix &m, int group, int count) {
    constexpr int64_t WIDTH = 64 * GROUP, MOST = 512 << 10;
    const int first = group * GROUP, last = first + count * GROUP < tiles_in(m) ? first + count * GROUP : tiles_in(m);
    const int64_t bytes = (last - first) * bytes_of_columns(m.kind, m.cols);
    return {start_of(m, group), static_cast<int32_t>((bytes < MOST ? bytes : MOST) / WIDTH), WIDTH, WIDTH};
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
