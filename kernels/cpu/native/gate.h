// The choice of experts from the gate's logits.
#ifndef MORAY_GATE_H
#define MORAY_GATE_H

#include "gemm.h"

namespace {

// Whether score `a` of expert or group `i` comes before `b` of `j`: a NaN before all numbers, of equals the lower number.
INLINE bool before(float a, int i, float b, int j) {
    if (a != a) return b == b || i < j;
    if (b != b) return false;
    return a > b || (a == b && i < j);
}

INLINE int best_of(const float *scores, int count, const uint8_t *barred) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (!(barred && barred[i]) && (best < 0 || before(scores[i], i, scores[best], best))) best = i;
    return best;
}

// In place.
INLINE void exponentials(float *x, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, exponential(load(x + i)));
    for (; i < count; i++) x[i] = exponential(all(x[i]))[0];
}

// The choice of kernels/gate.py for one token; `scores` and `choice` are room for `experts` floats each.
static void select_experts(const moray_layer &layer, const float *logits, float *scores, float *choice, uint8_t *barred,
                           int64_t *ids, float *weights) {
    const int experts = layer.experts, size = experts / layer.groups;
    if (layer.softmax) {
        float largest = logits[0], total = 0.0f;
        for (int e = 1; e < experts; e++) largest = logits[e] > largest ? logits[e] : largest;
        for (int e = 0; e < experts; e++) scores[e] = logits[e] - largest;
        exponentials(scores, experts);
        for (int e = 0; e < experts; e++) total += scores[e];
        for (int e = 0; e < experts; e++) scores[e] /= total;
    } else {
        for (int e = 0; e < experts; e++) scores[e] = -logits[e];
        exponentials(scores, experts);
        for (int e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + scores[e]);
    }
    for (int e = 0; e < experts; e++) choice[e] = layer.gate_bias ? scores[e] + layer.gate_bias[e] : scores[e];
    memset(barred, 0, experts + layer.groups);
    uint8_t *barred_groups = barred + experts;
    if (layer.groups > 1) {
        float best[layer.groups];
        for (int g = 0; g < layer.groups; g++) {
            const float *member = choice + g * size;
            const int first = best_of(member, size, nullptr);
            best[g] = member[first];
            if (layer.gate_bias) {
                barred[g * size + first] = 1;
                best[g] += member[best_of(member, size, barred + g * size)];
                barred[g * size + first] = 0;
            }
        }
        for (int kept = 0; kept < layer.kept_groups; kept++) barred_groups[best_of(best, layer.groups, barred_groups)] = 1;
        // Experts of other groups come after all of these, lower numbers first: as if their scores were -infinity.
        for (int e = 0; e < experts; e++)
            if (!barred_groups[e / size]) choice[e] = -INFINITY;
    }
    float total = 0.0f;
    for (int k = 0; k < layer.top_k; k++) {
        const int e = best_of(choice, experts, barred);
        barred[e] = 1;
        ids[k] = e;
        weights[k] = scores[e];
        total += scores[e];
    }
    for (int k = 0; k < layer.top_k; k++) {
        if (layer.normalise) weights[k] /= total + 1e-20f;
        weights[k] *= layer.routed_scale;
    }
}

}  // namespace
#endif
