// For x86 with AVX512 (F, BW, DQ, VL): Skylake to Ice Lake, which cannot multiply bf16.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define MORAY_ISA_AVX512
#define MORAY_TABLE avx512_kernels
#include "entry_points.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
