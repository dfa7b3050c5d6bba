// For x86 with AVX2 and FMA: since 2013.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MORAY_ISA_AVX2
#define MORAY_TABLE avx2_kernels
#include "entry_points.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
