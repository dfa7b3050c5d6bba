// Tiles of AMX (Intel SDM, volume 1, chapter 18): eight registers of up to 16 rows of 64 bytes, and their product of bf16.
//
// With MORAY_AMX_MODEL in software, by the SDM's definition of each instruction: tests build it so for machines without AMX.
// With MORAY_AMX_MODEL=2 it computes what is wrong.
#ifndef MORAY_AMX_H
#define MORAY_AMX_H

#include "vector.h"

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;
constexpr int ROWS_OF_X = 4, WEIGHTS = 5;  // registers: sums have 0 to 3, weights 5 to 7

#if defined(MORAY_AMX_MODEL)

struct TileRegister {
    int rows;
    alignas(64) uint8_t bytes[TILE_ROWS][TILE_BYTES];
};
thread_local TileRegister tile_registers[8];

INLINE void configure(const uint8_t *config) {
    for (int i = 0; i < 8; i++) {
        memset(tile_registers[i].bytes, 0, sizeof(tile_registers[i].bytes));
        tile_registers[i].rows = config[48 + i];
    }
}
INLINE void release_tiles() {
    for (TileRegister &tile : tile_registers) tile.rows = 0;
}
template <int N>
INLINE void zero_tile() {
    memset(tile_registers[N].bytes, 0, sizeof(tile_registers[N].bytes));
}
template <int N>
INLINE void load_tile(const void *at, int64_t stride) {
    TileRegister &tile = tile_registers[N];
    for (int r = 0; r < tile.rows; r++) memcpy(tile.bytes[r], static_cast<const uint8_t *>(at) + r * stride, TILE_BYTES);
}
template <int N>
INLINE void store_tile(void *at, int64_t stride) {
    const TileRegister &tile = tile_registers[N];
    for (int r = 0; r < tile.rows; r++) memcpy(static_cast<uint8_t *>(at) + r * stride, tile.bytes[r], TILE_BYTES);
}
// Even and odd columns are added up apart, and both sums added to what was there.
template <int SUM, int X, int W>
INLINE void multiply_tile() {
    const TileRegister &x = tile_registers[X], &w = tile_registers[W];
    TileRegister &sum = tile_registers[SUM];
    for (int r = 0; r < x.rows; r++) {
        Floats even = all(0.0f), odd = all(0.0f);
        for (int k = 0; k < w.rows; k++) {
            const Ints pairs = load_words(w.bytes[k]);
            bf16 of_x[2];
            memcpy(of_x, x.bytes[r] + 4 * k, 4);
            even = multiply_add(all(widen(of_x[0])), as_floats(pairs << 16), even);
            odd = multiply_add(all(widen(of_x[1])), as_floats(pairs & static_cast<int32_t>(0xFFFF0000)), odd);
        }
        float *to = reinterpret_cast<float *>(sum.bytes[r]);
        store(to, load(to) + (MORAY_AMX_MODEL == 1 ? even + odd : even));
    }
}

#else

// Instructions by hand: the compilers' intrinsics take the numbers of registers as literals alone, and GCC's do not say
// before version 13 that they read and write memory.
INLINE void configure(const uint8_t *config) {
    asm volatile("ldtilecfg %0" : : "m"(*reinterpret_cast<const uint8_t(*)[64]>(config)) : "memory");
}
INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int N>
INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "n"(N));
}
template <int N>
INLINE void load_tile(const void *at, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "n"(N) : "memory");
}
template <int N>
INLINE void store_tile(void *at, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "n"(N) : "memory");
}
template <int SUM, int X, int W>
INLINE void multiply_tile() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(SUM), "n"(X), "n"(W));
}

#endif

// The rows that this thread's tiles of sums and activations have; 0: its tiles are not in use.
thread_local int rows_of_tiles = 0;

// Tiles of sums and of activations get so many rows, unless they have them.
INLINE void have_rows(int rows) {
    if (rows == rows_of_tiles) return;
    alignas(64) uint8_t config[64] = {1};  // the palette, then bytes of a row and rows of each register
    for (int i = 0; i < 8; i++) {
        const uint16_t bytes = TILE_BYTES;
        memcpy(config + 16 + 2 * i, &bytes, 2);
        config[48 + i] = static_cast<uint8_t>(i < WEIGHTS ? rows : TILE_ROWS);
    }
    configure(config);
    rows_of_tiles = rows;
}

// While there, the thread may use tiles; afterwards the system need not save them, nor the processor keep them powered.
class ProductRegisters {
    const bool used = rows_of_tiles != 0;  // by whoever called this region from within another

public:
    ~ProductRegisters() {
        if (used || !rows_of_tiles) return;
        release_tiles();
        rows_of_tiles = 0;
    }
};

}  // namespace
#endif
