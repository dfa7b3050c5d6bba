// What vector.h and products_f32.h need of AVX512 without BF16: F, BW, DQ and VL.
#ifndef MORAY_AVX512_F32_H
#define MORAY_AVX512_F32_H

#include "codes_by_shifts.h"

namespace {

// sum += a b. Written out, as for AVX2.
INLINE void accumulate(Floats &sum, Floats a, Floats b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
INLINE void narrow_to(bf16 *at, Floats x) {
    const __m512i bits = (__m512i)x;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

// Two of four columns of sixteen rows' codes, as packed: pairs of bf16, in each of which the bits of BITS_OF_CODE count alone.
template <int PAIR>
INLINE Ints decoded_pair(const uint8_t *at) {
    constexpr int a = 8 * PAIR, b = a + 1, _ = -1;
    const __m512i order = _mm512_broadcast_i32x4(
        _mm_setr_epi8(_, a, _, b, _, a + 2, _, b + 2, _, a + 4, _, b + 4, _, a + 6, _, b + 6));
    const __m512i codes = (__m512i)load_words(at);
    return (Ints)_mm512_srai_epi16(_mm512_shuffle_epi8(codes, order), 4);
}

void prepare() {}

}  // namespace
#endif
