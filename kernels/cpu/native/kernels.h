// The entry points of one instruction set.
#ifndef MORAY_KERNELS_H
#define MORAY_KERNELS_H

#include "moray_cpu.h"

namespace moray {

struct Kernels {
    void (*prepare)();
    void (*linear)(const moray_bf16 *, int32_t, const moray_matrix *, void *, int);
    void (*rms_norm)(const moray_bf16 *, int32_t, int32_t, const moray_bf16 *, float, moray_bf16 *);
    void (*swiglu)(const moray_bf16 *, int32_t, const moray_mlp *, float *);
    int (*grouped_mlp)(const moray_bf16 *, int32_t, const int32_t *, const int32_t *, int32_t, const moray_mlp *, int32_t,
                       moray_bf16 *);
    void (*attention)(const moray_layer *, const moray_batch *, moray_bf16 *, moray_bf16 *, moray_bf16 *, int64_t *, float *);
    void (*latents)(const moray_layer *, const moray_batch *, const moray_bf16 *, moray_bf16 *);
    void (*add)(moray_bf16 *, const float *, const float *, int64_t);
    void (*combine)(const moray_bf16 *const *, const float *, int32_t, int32_t, int32_t, float *);
    void (*sample)(const float *, int64_t, int32_t, int32_t, const moray_sampling *, int32_t *);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#if __has_include(<amxtileintrin.h>)
extern const Kernels amx_kernels;
#endif
#endif

}  // namespace moray
#endif
