// Floats in registers, and what the rest computes with them. Included by the isa_*.cpp files alone, each compiled for its own
// instructions: everything here is in an anonymous namespace, so that no linker takes one's code for another's.
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

// As wide as the registers: compilers keep wider vectors in memory, and take comparisons of them apart lane by lane.
#if defined(MORAY_ISA_AVX512)
constexpr int LANES = 16;
#elif defined(MORAY_ISA_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef moray_bf16 bf16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

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

}  // namespace

#if defined(MORAY_ISA_AVX512)
#include "avx512.h"
#elif defined(MORAY_ISA_AVX2)
#include "avx2.h"
#else
#include "generic.h"
#endif

namespace {

// Of all lanes, the upper half of what is left joined to the lower one until one is left.
template <int LEFT = LANES>
INLINE float sum_of(Floats x) {
    if constexpr (LEFT == 1)
        return x[0];
    else
        return sum_of<LEFT / 2>(x + across<LEFT / 2>(x));
}

template <int LEFT = LANES>
INLINE float largest_of(Floats x) {
    if constexpr (LEFT == 1)
        return x[0];
    else
        return largest_of<LEFT / 2>(larger(x, across<LEFT / 2>(x)));
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

}  // namespace
#endif
