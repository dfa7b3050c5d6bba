// What vector.h and products_f32.h need, by what any compiler has.
#ifndef MORAY_GENERIC_H
#define MORAY_GENERIC_H

namespace {

// The compiler fuses nothing by itself (-ffp-contract=off): where a sum must have the bits of kernels/combine.py, it has them.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE void accumulate(Floats &sum, Floats a, Floats b) { sum = multiply_add(a, b, sum); }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats widen_at(const bf16 *at) {
    Floats x;
    for (int i = 0; i < LANES; i++) x[i] = widen(at[i]);
    return x;
}
INLINE void narrow_to(bf16 *at, Floats x) {
    for (int i = 0; i < LANES; i++) at[i] = narrow(x[i]);
}

// Lane i becomes lane i ^ DISTANCE.
template <int DISTANCE>
INLINE Floats across(Floats x) {
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = x[i ^ DISTANCE];
    return y;
}

uint16_t bf16_of_code[256];
constexpr float CODES_BY_ACTIVATION = 1.0f, CODES_BY_SCALE = 1.0f;
constexpr int32_t BITS_OF_CODE = static_cast<int32_t>(0xFFFF0000);

// Two of four columns of four rows' codes, as packed.
template <int PAIR>
INLINE Ints decoded_pair(const uint8_t *at) {
    Ints pair;
    for (int i = 0; i < LANES; i++)
        pair[i] = static_cast<int32_t>(bf16_of_code[at[8 * PAIR + 2 * i]] |
                                       static_cast<uint32_t>(bf16_of_code[at[8 * PAIR + 2 * i + 1]]) << 16);
    return pair;
}

// Four vectors of four words become their columns.
INLINE void transpose(Ints *v) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const int32_t one = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = one;
        }
}

void prepare() {
    for (int code = 0; code < 256; code++) {
        const int e = code >> 3 & 15, m = code & 7;
        const float size = e ? ldexpf(1.0f + m / 8.0f, e - 7) : ldexpf(m / 8.0f, -6);
        bf16_of_code[code] = narrow(code & 128 ? -size : size);
    }
}

}  // namespace
#endif
