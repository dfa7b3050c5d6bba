// What vector.h and products_bf16.h need of AVX512 with VBMI and BF16.
#ifndef MORAY_AVX512_BF16_H
#define MORAY_AVX512_BF16_H

namespace {

INLINE void narrow_to(bf16 *at, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), (__m256i)_mm512_cvtneps_pbh((__m512)x));
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
