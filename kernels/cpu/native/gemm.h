// Rows of activations times packed matrices.
//
// The one order of every sum, whatever the batch: columns ascend within blocks of 128; each block's sum starts at zero, is
// multiplied with the block's scale and added to the total. Nothing is ever summed across outputs that share a register, and how
// many rows or tiles are computed together changes no bit.
#ifndef MORAY_GEMM_H
#define MORAY_GEMM_H

#include "pool.h"
#include "tiles.h"
#if defined(MORAY_ISA_AMX)
#include "products_amx.h"
#elif defined(MORAY_ISA_BF16)
#include "products_bf16.h"
#else
#include "products_f32.h"
#endif

namespace {

#if !defined(MORAY_ISA_AMX)
struct ProductRegisters {};  // those that every thread has
#endif

// What a region's threads run if they compute products.
template <moray::Task TASK>
static void with_products(void *argument) {
    const ProductRegisters here;
    TASK(argument);
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
    for (; i + LANES <= count; i += LANES) narrow_to(to + i, load(from + i));
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
