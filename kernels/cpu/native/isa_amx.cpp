// For x86 with AMX of bf16, beside AVX512 with VBMI and BF16: Sapphire Rapids and newer. Compilers that do not know it leave
// it out.
#if defined(__x86_64__) && __has_include(<amxtileintrin.h>)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define MORAY_ISA_AVX512
#define MORAY_ISA_BF16
#define MORAY_ISA_AMX
#define MORAY_TABLE amx_kernels
#include "entry_points.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
