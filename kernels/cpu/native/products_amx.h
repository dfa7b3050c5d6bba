// Products of bf16 by tiles of AMX: 16 rows times 32 columns of x, times those columns of 16 outputs.
//
// For one row as for many: the order of its sums (amx.h) is not that of pairs of bf16 in vectors, and a row's bits must not
// depend on the others. For few rows the weights' memory is what binds, whoever multiplies.
#ifndef MORAY_PRODUCTS_AMX_H
#define MORAY_PRODUCTS_AMX_H

#include "amx.h"
#include "products_bf16.h"

namespace {

constexpr int STEP = 32;  // columns of one product of tiles

// As many columns of all rows as are computed at a time, and of four tiles of weights.
struct Panel {
    int columns;
    const uint8_t *weights;  // of bf16, in pairs of columns, `step` bytes from one to the next
    int64_t step;
    const uint8_t *ahead;    // what to fetch meanwhile, laid out alike, or NULL
    float scale;
};

// Rows of activations as a tile's.
struct RowsOfX {
    const uint8_t *at;
    int64_t stride;
};

template <int T>
INLINE void multiply_step(const Panel &panel, int step, const uint8_t *ahead) {
    load_tile<WEIGHTS + T % 3>(panel.weights + step * (STEP / 2) * panel.step + 64 * T, panel.step);
    multiply_tile<T, ROWS_OF_X, WEIGHTS + T % 3>();
    if (ahead)
        for (int line = 0; line < STEP / 2; line++) fetch(ahead + (step * (STEP / 2) + line) * panel.step + 64 * T);
}

// totals[r][t][16] += x[r] . tile[t] over the columns of a panel, for `rows` rows, at most those that the tiles have.
template <int T>
static void multiply_panel(const RowsOfX &x, int rows, const Panel &panel, const uint8_t *ahead, float *totals,
                           int64_t row_stride) {
    zero_tile<0>();
    if constexpr (T > 1) zero_tile<1>();
    if constexpr (T > 2) zero_tile<2>();
    if constexpr (T > 3) zero_tile<3>();
    for (int step = 0; step * STEP < panel.columns; step++) {
        load_tile<ROWS_OF_X>(x.at + step * STEP * sizeof(bf16), x.stride);
        multiply_step<0>(panel, step, ahead);
        if constexpr (T > 1) multiply_step<1>(panel, step, ahead);
        if constexpr (T > 2) multiply_step<2>(panel, step, ahead);
        if constexpr (T > 3) multiply_step<3>(panel, step, ahead);
    }
    alignas(64) float sums[TILE_ROWS][T * TILE];
    store_tile<0>(sums[0], sizeof(sums[0]));
    if constexpr (T > 1) store_tile<1>(sums[0] + TILE, sizeof(sums[0]));
    if constexpr (T > 2) store_tile<2>(sums[0] + 2 * TILE, sizeof(sums[0]));
    if constexpr (T > 3) store_tile<3>(sums[0] + 3 * TILE, sizeof(sums[0]));
    const Floats scale = all(panel.scale);
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            float *total = totals + r * row_stride + t * TILE;
            store(total, multiply_add(load(sums[r] + t * TILE), scale, load(total)));
        }
}

static void multiply_panel(int tiles, const RowsOfX &x, int rows, const Panel &panel, const uint8_t *ahead, float *totals,
                           int64_t row_stride) {
    switch (tiles) {
        case 4: return multiply_panel<4>(x, rows, panel, ahead, totals, row_stride);
        case 3: return multiply_panel<3>(x, rows, panel, ahead, totals, row_stride);
        case 2: return multiply_panel<2>(x, rows, panel, ahead, totals, row_stride);
        case 1: return multiply_panel<1>(x, rows, panel, ahead, totals, row_stride);
    }
}

// The same for any number of rows: columns begin to end of x, at most BLOCK.
static void multiply_panel_of_all(const bf16 *const *x, int rows, int tiles, Panel panel, int begin, float *totals,
                                  int64_t row_stride) {
    const int whole = (panel.columns + STEP - 1) / STEP * STEP;
    // What is missing of the last tile's columns are zeros, on both sides: others' activations may be NaN.
    alignas(64) uint8_t filled[sizeof(bf16) * BLOCK * TILE * GROUP], copied[TILE_ROWS][sizeof(bf16) * BLOCK];
    if (panel.columns < whole) {
        const int pairs = panel.columns / 2, width = 64 * tiles;
        for (int pair = 0; pair < pairs; pair++) memcpy(filled + pair * width, panel.weights + pair * panel.step, width);
        memset(filled + pairs * width, 0, (whole / 2 - pairs) * width);
        panel.weights = filled;
        panel.step = width;
        panel.ahead = nullptr;
    }
    const size_t bytes = sizeof(bf16) * panel.columns;
    const int parts = (rows + TILE_ROWS - 1) / TILE_ROWS, most = (rows + parts - 1) / parts;
    have_rows(most);
    for (int at = 0; at < rows; at += most) {
        const int now = rows - at < most ? rows - at : most;
        const bf16 *const *row = x + at;
        const auto address = [&](int r) { return reinterpret_cast<intptr_t>(row[r]); };
        RowsOfX from = {reinterpret_cast<const uint8_t *>(row[0] + begin), now > 1 ? address(1) - address(0) : 0};
        bool as_they_lie = now == most && panel.columns == whole;
        for (int r = 2; r < now && as_they_lie; r++) as_they_lie = address(r) - address(r - 1) == from.stride;
        if (!as_they_lie) {
            for (int r = 0; r < now; r++) {
                memcpy(copied[r], row[r] + begin, bytes);
                memset(copied[r] + bytes, 0, sizeof(bf16) * whole - bytes);
            }
            if (now < most) memset(copied[now], 0, sizeof(copied[0]) * (most - now));
            from = {copied[0], sizeof(copied[0])};
        }
        multiply_panel(tiles, from, now, panel, at == 0 ? panel.ahead : nullptr, totals + at * row_stride, row_stride);
    }
}

// totals[r][t][16] = x[r] . tile[t] over all `cols` columns, for at most ROW_BLOCK rows.
static void product(const bf16 *const *x, int rows, const Tiles &tiles, int kind, int cols, float *totals,
                    int64_t row_stride) {
    for (int r = 0; r < rows; r++) memset(totals + r * row_stride, 0, sizeof(float) * TILE * tiles.count);
    if (kind == MORAY_F32) return multiply_rows<MORAY_F32>(x, rows, tiles, 0, cols, totals, row_stride);
    const int64_t bytes = tiles.step * (BLOCK / (kind == MORAY_BF16 ? 2 : 4));
    Tiles block = tiles;
    for (int begin = 0; begin < cols; begin += BLOCK, block.data += bytes) {
        const int end = begin + BLOCK < cols ? begin + BLOCK : cols;
        block.next = end < cols ? block.data + bytes : tiles.next;
        Panel panel = {end - begin, block.data, block.step, block.next, 1.0f};
        alignas(64) uint8_t decoded[sizeof(bf16) * BLOCK * TILE * GROUP];
        if (kind == MORAY_E4M3) {
            if (block.next) fetch({block.next, static_cast<int>(bytes / 64)});
            const Tiles bf16s = decoded_tiles(block, begin, end, decoded);
            panel.weights = bf16s.data;
            panel.step = bf16s.step;
            panel.ahead = nullptr;
            if (tiles.scales) panel.scale = tiles.scales[begin / BLOCK];
        }
        multiply_panel_of_all(x, rows, tiles.count, panel, begin, totals, row_stride);
    }
}

// totals[r][t][16] += x[r] . tile[t], columns begin to end of x, of tiles of bf16 that were packed just now.
static void multiply_packed(const bf16 *const *x, int rows, int tiles, const uint8_t *packed, int begin, int end, float *totals,
                            int64_t row_stride, Prefetch ahead) {
    fetch(ahead);
    multiply_panel_of_all(x, rows, tiles, {end - begin, packed, 64 * tiles, nullptr, 1.0f}, begin, totals, row_stride);
}

}  // namespace
#endif
