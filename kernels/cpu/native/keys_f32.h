// Keys and values of attention as packed matrices of fp32.
#ifndef MORAY_KEYS_F32_H
#define MORAY_KEYS_F32_H

#include "gemm.h"

namespace {

typedef float Packed;  // an element of what is packed

// Columns begin to end, an even number of at most BLOCK, of KEYS rows (NULL: zeros): [column][key].
INLINE void pack_keys(const bf16 *const *rows, int begin, int end, Packed *packed) {
    int column = begin;
    for (; column + LANES <= end; column += LANES, packed += LANES * KEYS)
        for (int key = 0; key < KEYS; key += LANES) transpose_to(packed + key, KEYS, rows + key, column);
    for (; column < end; column++, packed += KEYS)
        for (int key = 0; key < KEYS; key++) packed[key] = rows[key] ? widen(rows[key][column]) : 0.0f;
}

// Columns `column` and the `tiles` times sixteen from it on of KEYS rows (NULL: zeros), [key][column].
INLINE void pack_values(const bf16 *const *rows, int column, int tiles, Packed *packed) {
    for (int key = 0; key < KEYS; key++, packed += tiles * TILE)
        for (int i = 0; i < tiles * TILE; i += LANES)
            store(packed + i, rows[key] ? widen_at(rows[key] + column + i) : all(0.0f));
}

// totals[r][t][16] += x[r] . tile[t], columns begin to end of x, of `tiles` packed ones.
static void multiply_packed(const bf16 *const *x, int rows, int tiles, const Packed *packed, int begin, int end, float *totals,
                            int64_t row_stride) {
    alignas(64) float wide[ROW_BLOCK * BLOCK];
    widen_rows(x, rows, begin, end, 1.0f, wide);
    const Columns columns = {reinterpret_cast<const uint8_t *>(packed), static_cast<int64_t>(sizeof(Packed)) * TILE * tiles,
                             end - begin, 1.0f, nullptr};
    multiply_rows<MORAY_F32>(wide, rows, columns, tiles, totals, row_stride);
}

}  // namespace
#endif
