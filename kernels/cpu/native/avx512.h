// What vector.h needs of AVX512, as Intel's servers have had it since Skylake, and AMD's since Zen 4.
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

}  // namespace

#if defined(MORAY_ISA_BF16)
#include "avx512_bf16.h"
#else
#include "avx512_f32.h"
#endif
#endif
