// How products_f32.h has codes of e4m3 decoded where bytes can be shuffled.
#ifndef MORAY_CODES_BY_SHIFTS_H
#define MORAY_CODES_BY_SHIFTS_H

namespace {

// Codes of e4m3 become bf16 by shifts alone: put where bf16 has its sign, the lowest four bits of its exponent and its mantissa's
// first three, a code is 2^-120 of its value, subnormals included. Activations are multiplied with a part of 2^120, and scales
// with the rest, so that neither overflows: activations may be as large as 2^71, and what sums lose is below 2^-85.
constexpr float CODES_BY_ACTIVATION = 0x1p56f, CODES_BY_SCALE = 0x1p64f;

constexpr int32_t BITS_OF_CODE = static_cast<int32_t>(0x87F00000);

}  // namespace
#endif
