// What vector.h and products_f32.h need of AVX2 and FMA.
#ifndef MORAY_AVX2_H
#define MORAY_AVX2_H

#include "codes_by_shifts.h"

namespace {

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
// sum += a b. Written out, since compilers choose forms of the instruction that move sums from register to register, and keep
// some of twelve in memory.
INLINE void accumulate(Floats &sum, Floats a, Floats b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Floats widen_at(const bf16 *at) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at))), 16);
}
INLINE void narrow_to(bf16 *at, Floats x) {
    const __m256i bits = (__m256i)x;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);
    const __m256i chosen = (__m256i)_mm256_blendv_ps((__m256)rounded, (__m256)nan, is_nan);
    const __m256i words = _mm256_srli_epi32(chosen, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(at),
                     _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// Lane i becomes lane i ^ DISTANCE.
template <int DISTANCE>
INLINE Floats across(Floats x) {
    if constexpr (DISTANCE == 4) return (Floats)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
    if constexpr (DISTANCE == 2) return (Floats)_mm256_permute_ps((__m256)x, 0x4E);
    return (Floats)_mm256_permute_ps((__m256)x, 0xB1);
}

// Two of four columns of eight rows' codes, as packed: pairs of bf16, in each of which the bits of BITS_OF_CODE count alone.
template <int PAIR>
INLINE Ints decoded_pair(const uint8_t *at) {
    constexpr int a = 8 * PAIR, b = a + 1, _ = -1;
    const __m256i order = _mm256_setr_epi8(_, a, _, b, _, a + 2, _, b + 2, _, a + 4, _, b + 4, _, a + 6, _, b + 6,
                                           _, a, _, b, _, a + 2, _, b + 2, _, a + 4, _, b + 4, _, a + 6, _, b + 6);
    // Volatile, to be read for each pair anew: there are registers for twelve sums only if nothing is kept.
    const __m256i codes = (__m256i)*reinterpret_cast<const volatile LooseInts *>(at);
    return (Ints)_mm256_srai_epi16(_mm256_shuffle_epi8(codes, order), 4);
}

// Eight vectors of eight words become their columns.
INLINE void transpose(Ints *v) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xEE);
        }
    for (int c = 0; c < 4; c++) {
        v[c] = (Ints)_mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
        v[c + 4] = (Ints)_mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
    }
}

void prepare() {}

}  // namespace
#endif
