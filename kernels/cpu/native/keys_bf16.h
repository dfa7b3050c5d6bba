// Keys and values of attention as packed matrices of bf16.
#ifndef MORAY_KEYS_BF16_H
#define MORAY_KEYS_BF16_H

#include "gemm.h"

namespace {

typedef bf16 Packed;  // an element of what is packed

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
INLINE void pack_sixteen(const bf16 *const *rows, int begin, int end, uint8_t *packed) {
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

// The same of KEYS rows, as both tiles.
INLINE void pack_keys(const bf16 *const *rows, int begin, int end, Packed *packed) {
    uint8_t *bytes = reinterpret_cast<uint8_t *>(packed);
    pack_sixteen(rows, begin, end, bytes);
    pack_sixteen(rows + 16, begin, end, bytes + 64);
}

// Columns `column` and the `tiles` times sixteen from it on of KEYS rows (NULL: zeros), as a group of tiles: pairs of rows.
INLINE void pack_values(const bf16 *const *rows, int column, int tiles, Packed *to) {
    uint8_t *packed = reinterpret_cast<uint8_t *>(to);
    const bf16 nothing[16] = {};
    for (int p = 0; p < KEYS / 2; p++)
        for (int t = 0; t < tiles; t++, packed += 64) {
            const bf16 *even = rows[2 * p] ? rows[2 * p] + column + t * TILE : nothing;
            const bf16 *odd = rows[2 * p + 1] ? rows[2 * p + 1] + column + t * TILE : nothing;
            store_words(packed, (as_ints(widen_at(even)) >> 16 & 0xFFFF) | as_ints(widen_at(odd)));
        }
}

// totals[r][t][16] += x[r] . tile[t], columns begin to end of x, of `tiles` packed ones.
static void multiply_packed(const bf16 *const *x, int rows, int tiles, const Packed *packed, int begin, int end, float *totals,
                            int64_t row_stride) {
    const Tiles group = {tiles, reinterpret_cast<const uint8_t *>(packed), 64 * tiles, nullptr, nullptr};
    multiply_rows<MORAY_BF16>(x, rows, group, begin, end, totals, row_stride);
}

}  // namespace
#endif
