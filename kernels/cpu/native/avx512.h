// What vector.h and products_bf16.h need of AVX512 with VBMI and BF16.
#ifndef MORAY_AVX512_H
#define MORAY_AVX512_H

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

namespace {

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Floats widen_at(const bf16 *at) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at))), 16);
}
INLINE void narrow_to(bf16 *at, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// Lane i becomes lane i ^ DISTANCE.
template <int DISTANCE>
INLINE Floats across(Floats x) {
    if constexpr (DISTANCE == 8) return SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (DISTANCE == 4) return SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if constexpr (DISTANCE == 2) return SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

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

// ---- pairs of bf16: `Pairs` are two columns of sixteen rows of a tile, `Pair` is two columns of a row of activations -----

typedef __m512bh Pairs;
typedef __m512bh Pair;

INLINE Pair pair_at(const bf16 *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return (Pair)_mm512_set1_epi32(both);
}
INLINE Floats dot(Floats sum, Pair x, Pairs w) { return (Floats)_mm512_dpbf16_ps((__m512)sum, x, w); }
INLINE Pairs pairs_at(const void *at) { return (Pairs)_mm512_loadu_si512(at); }
INLINE void store_pairs(void *at, Pairs w) { _mm512_storeu_si512(at, (__m512i)w); }

// An e4m3 code's bf16 as two bytes, each looked up by the code's lower 7 bits in a table of 128: exact, subnormals included.
struct Decoder {
    __m512i high0, high1, low0, low1;
    void prepare() {
        alignas(64) uint8_t high[128], low[128];
        for (int code = 0; code < 128; code++) {
            const int e = code >> 3, m = code & 7;
            const float value = e ? ldexpf(1.0f + m / 8.0f, e - 7) : ldexpf(m / 8.0f, -6);
            const bf16 bits = code == 127 ? 0x7FC0 : narrow(value);
            high[code] = static_cast<uint8_t>(bits >> 8);
            low[code] = static_cast<uint8_t>(bits & 0xFF);
        }
        high0 = _mm512_load_si512(high);
        high1 = _mm512_load_si512(high + 64);
        low0 = _mm512_load_si512(low);
        low1 = _mm512_load_si512(low + 64);
    }
};

// 64 codes, four columns of sixteen rows in the order described below, as two times two columns.
INLINE void decode(const Decoder &table, const uint8_t *at, Pairs &first, Pairs &second) {
    // Volatile, to be read once: a lookup overwrites its index, and the compiler would rather read that again than copy it.
    // With three loads a line one token's experts took 1.05 times as long (Zen 4).
    const __m512i codes = (__m512i)*reinterpret_cast<const volatile LooseInts *>(at);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i high = _mm512_permutex2var_epi8(table.high0, codes, table.high1);
    const __m512i low = _mm512_permutex2var_epi8(table.low0, codes, table.low1);
    high = _mm512_ternarylogic_epi32(high, codes, sign, 0xF8);  // high | (codes & sign)
    first = (Pairs)_mm512_unpacklo_epi8(low, high);
    second = (Pairs)_mm512_unpackhi_epi8(low, high);
}

// Prepared when these instructions are chosen, not when the library is loaded: the machine may not have them.
Decoder decoder;
void prepare() { decoder.prepare(); }

}  // namespace
#endif
