// The choice of experts from the gate's logits.
#ifndef MORAY_GATE_H
#define MORAY_GATE_H

#include "gemm.h"

namespace {

// Integers in the order of the scores: a NaN before all numbers, -0 like 0.
INLINE int32_t rank_of(float score) {
    int32_t bits;
    memcpy(&bits, &score, 4);
    if (score != score) return INT32_MAX;
    return bits >= 0 ? bits : static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits));
}
constexpr int32_t BARRED = INT32_MIN;  // below every score's

// The first of the largest. In two loops, of which compilers make vectors of the first.
INLINE int best_of(const int32_t *ranks, int count) {
    int32_t largest = BARRED;
    for (int i = 0; i < count; i++) largest = ranks[i] > largest ? ranks[i] : largest;
    int best = 0;
    while (best < count - 1 && ranks[best] != largest) best++;
    return best;
}

// In place.
INLINE void exponentials(float *x, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, exponential(load(x + i)));
    for (; i < count; i++) x[i] = exponential(all(x[i]))[0];
}

// The choice of kernels/gate.py for one token; `scores`, `choice` and `ranks` are room for `experts` numbers each.
static void select_experts(const moray_layer &layer, const float *logits, float *scores, float *choice, int32_t *ranks,
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
    for (int e = 0; e < experts; e++) ranks[e] = rank_of(choice[e]);
    if (layer.groups > 1) {
        int32_t best[layer.groups];
        bool kept[layer.groups];
        for (int g = 0; g < layer.groups; g++) {
            int32_t *member = ranks + g * size;
            const int first = best_of(member, size);
            float score = choice[g * size + first];
            if (layer.gate_bias) {
                const int32_t rank = member[first];
                member[first] = BARRED;
                score += choice[g * size + best_of(member, size)];
                member[first] = rank;
            }
            best[g] = rank_of(score);
            kept[g] = false;
        }
        for (int count = 0; count < layer.kept_groups; count++) {
            const int g = best_of(best, layer.groups);
            best[g] = BARRED;
            kept[g] = true;
        }
        // Experts of other groups come after all of these, lower numbers first: as if their scores were -infinity.
        const int32_t last = rank_of(-INFINITY);
        for (int e = 0; e < experts; e++) ranks[e] = kept[e / size] ? ranks[e] : last;
    }
    float total = 0.0f;
    for (int k = 0; k < layer.top_k; k++) {
        const int e = best_of(ranks, experts);
        ranks[e] = BARRED;
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
