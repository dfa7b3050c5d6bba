// Packed matrices as what is multiplied with rows of activations: tiles of sixteen outputs, in groups.
#ifndef MORAY_TILES_H
#define MORAY_TILES_H

#include "vector.h"

namespace {

constexpr int TILE = MORAY_TILE;    // outputs packed together
constexpr int GROUP = MORAY_GROUP;  // tiles packed together, and computed by whoever takes one piece of work
constexpr int BLOCK = 128;          // columns that share a scale, and rows that do: those of a group all do
static_assert(BLOCK % (GROUP * TILE) == 0, "tiles of a group share their scales");
constexpr int ROW_BLOCK = 192;  // rows of totals held at a time: 48 KB

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

// Lines that lie one after the other, to be fetched while others are multiplied, a few at a time: a core waits for a few dozen of
// them at once, and does nothing while it is asked for more. Where a panel's were all asked for before the panel in front of it was
// multiplied, 32 rows of e4m3 took 1.15 times as long (Zen 5).
struct Prefetch {
    const uint8_t *at;
    int lines;
};
INLINE void fetch(const Prefetch &ahead) {
    for (int line = 0; line < ahead.lines; line++) fetch(ahead.at + 64 * line);
}

}  // namespace
#endif
