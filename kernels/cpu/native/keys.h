// Keys and values of attention as packed matrices of bf16.
#ifndef MORAY_KEYS_H
#define MORAY_KEYS_H

#include "gemm.h"

namespace {

constexpr int KEYS = 32;                   // positions that are attended to together
constexpr int KEY_STEP = KEYS / TILE * 64;  // bytes that two columns of all their keys take

// Columns begin to end, an even number, of KEYS rows (NULL: zeros), as a group of tiles.
INLINE void pack_keys(const bf16 *const *rows, int begin, int end, uint8_t *packed) {
    for (int key = 0; key < KEYS; key += LANES, rows += LANES) {
        uint8_t *to = packed + 4 * key;
        int column = begin;
        for (; column + 2 * LANES <= end; column += 2 * LANES, to += LANES * KEY_STEP) {
            Ints v[LANES];
            for (int r = 0; r < LANES; r++) v[r] = rows[r] ? load_words(rows[r] + column) : (Ints){};
            transpose(v);
            for (int i = 0; i < LANES; i++) store_words(to + i * KEY_STEP, v[i]);
        }
        for (; column < end; column += 2, to += KEY_STEP)
            for (int r = 0; r < LANES; r++) {
                const int32_t zero = 0;
                memcpy(to + r * 4, rows[r] ? static_cast<const void *>(rows[r] + column) : &zero, 4);
            }
    }
}

// Columns `column` and the `tiles` times sixteen from it on of KEYS rows (NULL: zeros), as a group of tiles: pairs of rows.
INLINE void pack_values(const bf16 *const *rows, int column, int tiles, uint8_t *packed) {
    const bf16 nothing[LANES] = {};
    for (int p = 0; p < KEYS / 2; p++)
        for (int i = 0; i < tiles * TILE; i += LANES, packed += 4 * LANES) {
            const bf16 *even = rows[2 * p] ? rows[2 * p] + column + i : nothing;
            const bf16 *odd = rows[2 * p + 1] ? rows[2 * p + 1] + column + i : nothing;
            store_words(packed, (as_ints(widen_at(even)) >> 16 & 0xFFFF) | as_ints(widen_at(odd)));
        }
}

}  // namespace
#endif
