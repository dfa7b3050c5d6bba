// The small steps around the experts: sums of what came out of them.
#ifndef MORAY_SUMS_H
#define MORAY_SUMS_H

#include "gemm.h"

namespace {

static void add(bf16 *hidden, const float *routed, const float *shared, int64_t elements) {
    int64_t i = 0;
    for (; i + LANES <= elements; i += LANES) {
        Floats sum = routed ? load(routed + i) : load(shared + i);
        if (routed && shared) sum = sum + load(shared + i);
        bf16 rounded[LANES];
        narrow_to(rounded, sum);
        narrow_to(hidden + i, widen_at(hidden + i) + widen_at(rounded));
    }
    for (; i < elements; i++) {
        float sum = routed ? routed[i] : shared[i];
        if (routed && shared) sum += shared[i];
        hidden[i] = narrow(widen(hidden[i]) + widen(narrow(sum)));
    }
}

struct CombineJob {
    const bf16 *const *outputs;
    const float *weights;
    int32_t tokens, top_k, width;
    float *out;
    moray::Stage rows;
};

static void combine_task(void *argument) {
    CombineJob &job = *static_cast<CombineJob *>(argument);
    moray::share(job.rows, job.tokens, [&](int t) {
        const bf16 *const *outputs = job.outputs + static_cast<int64_t>(t) * job.top_k;
        const float *weights = job.weights + static_cast<int64_t>(t) * job.top_k;
        float *out = job.out + static_cast<int64_t>(t) * job.width;
        int i = 0;
        // Whole cache lines of one output after the other: 16 columns at a time took 1.7 times as long (64 x 8 rows of 7168,
        // Zen 5).
        for (; i + 4 * LANES <= job.width; i += 4 * LANES) {
            Floats total[4];
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) total[part] = widen_at(outputs[0] + i + part * LANES) * all(weights[0]);
            for (int k = 1; k < job.top_k; k++) {
                const bf16 *output = outputs[k] + i;
                const Floats weight = all(weights[k]);
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++) total[part] = total[part] + widen_at(output + part * LANES) * weight;
            }
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) store(out + i + part * LANES, total[part]);
        }
        for (; i + LANES <= job.width; i += LANES) {
            Floats total = widen_at(outputs[0] + i) * all(weights[0]);
            for (int k = 1; k < job.top_k; k++) total = total + widen_at(outputs[k] + i) * all(weights[k]);
            store(out + i, total);
        }
        for (; i < job.width; i++) {
            float total = widen(outputs[0][i]) * weights[0];
            for (int k = 1; k < job.top_k; k++) total = total + widen(outputs[k][i]) * weights[k];
            out[i] = total;
        }
    });
    moray::wait_for(job.rows, job.tokens);
}

static void combine(const bf16 *const *outputs, const float *weights, int32_t tokens, int32_t top_k, int32_t width,
                    float *out) {
    CombineJob job = {outputs, weights, tokens, top_k, width, out, {}};
    if (static_cast<int64_t>(tokens) * top_k * width < 1 << 17)  // less than a wake-up costs
        combine_task(&job);
    else
        moray::run(combine_task, &job);
}

}  // namespace
#endif
