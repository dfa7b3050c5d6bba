// For x86 with AVX512, VBMI and BF16: Sapphire Rapids, Zen 4, and newer.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,prefer-vector-width=512")
#endif
#define MORAY_ISA_AVX512
#define MORAY_ISA_BF16
#define MORAY_TABLE avx512_bf16_kernels
#include "entry_points.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
