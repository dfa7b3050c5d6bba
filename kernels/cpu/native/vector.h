// Sixteen floats at a time, and what the instruction sets do differently: multiplying pairs of bf16, decoding e4m3, and
// turning rows into columns. Included by the isa_*.cpp files alone, each compiled for its own instructions: everything here
// is in an anonymous namespace, so that no linker takes one's code for another's.
#ifndef MORAY_VECTOR_H
#define MORAY_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(MORAY_ISA_AVX512) || defined(MORAY_ISA_AVX2)
#include <immintrin.h>
#endif

#include "moray_cpu.h"

#define INLINE static inline __attribute__((always_inline))

namespace {

typedef moray_bf16 bf16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(64), aligned(2), may_alias));

INLINE Floats load(const float *at) { return *reinterpret_cast<const LooseFloats *>(at); }
INLINE void store(float *at, Floats x) { *reinterpret_cast<LooseFloats *>(at) = x; }
INLINE Ints load_words(const void *at) { return *reinterpret_cast<const LooseInts *>(at); }
INLINE void store_words(void *at, Ints x) { *reinterpret_cast<LooseInts *>(at) = x; }
INLINE Floats all(float x) { return x - (Floats){}; }
INLINE Ints as_ints(Floats x) { return (Ints)x; }
INLINE Floats as_floats(Ints x) { return (Floats)x; }

INLINE float widen(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// To nearest even; a NaN stays one.
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<bf16>(bits >> 16 | 0x40);
    return static_cast<bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

#if defined(MORAY_ISA_AVX512)

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Floats widen16(const bf16 *at) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at))), 16);
}
INLINE void narrow16(bf16 *at, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

#else

// The compiler fuses nothing by itself (-ffp-contract=off): where a sum must have the bits of kernels/combine.py, it has them.
#if defined(MORAY_ISA_AVX2)
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    union Halves {
        Floats whole;
        __m256 half[2];
    } x = {a}, y = {b}, z = {c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.whole;
}
#else
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats widen16(const bf16 *at) {
    Floats x;
    for (int i = 0; i < 16; i++) x[i] = widen(at[i]);
    return x;
}
INLINE void narrow16(bf16 *at, Floats x) {
    for (int i = 0; i < 16; i++) at[i] = narrow(x[i]);
}

#endif

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

// Of all lanes, the upper half of what is left joined to the lower one until one is left.
INLINE float sum_of(Floats x) {
    x = x + SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x = x + SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x = x + SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x = x + SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return x[0];
}

INLINE float largest_of(Floats x) {
    x = larger(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = larger(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}

// exp to about an ulp: x = n ln 2 + r, a polynomial of degree 6 for r (coefficients: Taylor's, |r| <= 0.3466), 2^n put into
// the exponent. 0 below -87.3, infinity above 88.7, NaN of a NaN. Every lane has the bits that it would have alone.
INLINE Floats exponential(Floats x) {
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Floats bounded = larger(all(-87.5f), x);
    bounded = bounded > all(89.0f) ? all(89.0f) : bounded;
    const Floats shifted = multiply_add(bounded, all(1.44269504f), magic);
    const Floats n = shifted - magic;
    Floats r = multiply_add(n, all(-0.693359375f), bounded);
    r = multiply_add(n, all(2.12194440e-4f), r);
    Floats p = all(1.0f / 720);
    p = multiply_add(p, r, all(1.0f / 120));
    p = multiply_add(p, r, all(1.0f / 24));
    p = multiply_add(p, r, all(1.0f / 6));
    p = multiply_add(p, r, all(0.5f));
    p = multiply_add(p, r, all(1.0f));
    p = multiply_add(p, r, all(1.0f));
    // In two halves: 2^n itself may lie outside what a float can hold where the product does not.
    const Ints whole = as_ints(shifted) - as_ints(magic);
    const Ints half = whole >> 1;
    p = p * as_floats((half + 127) << 23) * as_floats((whole - half + 127) << 23);
    p = x < all(-87.3f) ? all(0.0f) : p;
    p = x > all(88.7f) ? all(INFINITY) : p;
    return x != x ? x : p;
}

INLINE Floats silu(Floats x) { return x / (all(1.0f) + exponential(-x)); }

// ---- pairs of bf16: `Pairs` are two columns of sixteen rows of a tile, `Pair` is two columns of a row of activations -----

#if defined(MORAY_ISA_AVX512)

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

#else

struct Pairs {
    Floats even, odd;
};
struct Pair {
    float even, odd;
};

INLINE Pair pair_at(const bf16 *x) { return {widen(x[0]), widen(x[1])}; }
INLINE Floats dot(Floats sum, Pair x, Pairs w) {
    return multiply_add(all(x.odd), w.odd, multiply_add(all(x.even), w.even, sum));
}
INLINE Pairs pairs_at(const void *at) {
    const Ints both = load_words(at);
    return {as_floats(both << 16), as_floats(both & static_cast<int32_t>(0xFFFF0000))};
}
INLINE void store_pairs(void *at, Pairs w) {
    const Ints even = as_ints(w.even), odd = as_ints(w.odd);  // both are bf16, widened
    store_words(at, (Ints)(((__attribute__((vector_size(64))) uint32_t)even >> 16)) | (odd & static_cast<int32_t>(0xFFFF0000)));
}

struct Decoder {
    float value[256];
    void prepare() {
        for (int code = 0; code < 256; code++) {
            const int e = code >> 3 & 15, m = code & 7;
            const float size = e ? ldexpf(1.0f + m / 8.0f, e - 7) : ldexpf(m / 8.0f, -6);
            value[code] = (code & 127) == 127 ? NAN : code & 128 ? -size : size;
        }
    }
};

#if defined(MORAY_ISA_AVX2)

// A code moved to where fp16 has exponent and mantissa is 2^-8 of its value, subnormals included (kernels/fp8.py).
INLINE Floats decode16(__m128i codes) {
    const __m256i wide = _mm256_cvtepi8_epi16(codes);
    const __m256i half = _mm256_or_si256(
        _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3F80)),
        _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0x8000))));
    const __m256 scale = _mm256_set1_ps(256.0f);
    const __m256 low = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), scale);
    const __m256 high = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), scale);
    Floats x;
    memcpy(&x, &low, 32);
    memcpy(reinterpret_cast<char *>(&x) + 32, &high, 32);
    return x;
}

INLINE void decode(const Decoder &, const uint8_t *at, Pairs &first, Pairs &second) {
    // Bytes of four rows lie together as their columns 0 1 0 1 0 1 0 1 and then 2 3 2 3 2 3 2 3: apart by column.
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,
                                           0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    __m256i one = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)), order);
    __m256i two = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at + 32)), order);
    // Each holds for two groups of four rows the dwords (column 0, 1, 2, 3): a transposition of 4 x 4 dwords.
    const __m128i a = _mm256_castsi256_si128(one), b = _mm256_extracti128_si256(one, 1);
    const __m128i c = _mm256_castsi256_si128(two), d = _mm256_extracti128_si256(two, 1);
    const __m128i ab0 = _mm_unpacklo_epi32(a, b), ab2 = _mm_unpackhi_epi32(a, b);
    const __m128i cd0 = _mm_unpacklo_epi32(c, d), cd2 = _mm_unpackhi_epi32(c, d);
    first = {decode16(_mm_unpacklo_epi64(ab0, cd0)), decode16(_mm_unpackhi_epi64(ab0, cd0))};
    second = {decode16(_mm_unpacklo_epi64(ab2, cd2)), decode16(_mm_unpackhi_epi64(ab2, cd2))};
}

#else

INLINE void decode(const Decoder &table, const uint8_t *at, Pairs &first, Pairs &second) {
    for (int row = 0; row < 16; row++) {
        const uint8_t *codes = at + 16 * (row / 4) + 2 * (row % 4);
        first.even[row] = table.value[codes[0]];
        first.odd[row] = table.value[codes[1]];
        second.even[row] = table.value[codes[8]];
        second.odd[row] = table.value[codes[9]];
    }
}

#endif
#endif

// Prepared when these instructions are chosen, not when the library is loaded: the machine may not have them.
Decoder decoder;

// In 64 bytes of packed e4m3 the code of (row, column), column 0 to 3, is byte 16 (row / 4) + 2 (row % 4) + column % 2 +
// 8 (column / 2): so that two unpacking instructions bring each row's pairs of columns together.

}  // namespace
#endif
