// Choosing tokens: what kernels/sampling.py defines, token for token.
//
// What decides has the bits of the definition: exp and log are those of kernels/exact_math.py, operation by operation, and
// probability masses are integers in units of 2^-45 of the most likely token's. Nothing is sorted, and little is computed:
//
// * a border (top-k's smallest logit, top-p's last token) lies in one of 2048 buckets of logits, which one pass weighs; the few
//   tokens of that bucket are narrowed down by radix selection;
// * noise is computed only for tokens that it could make the best so far, by a bound from a few operations on its hash.
#ifndef MORAY_SAMPLING_H
#define MORAY_SAMPLING_H

#include <float.h>

#include "pool.h"
#include "vector.h"

namespace {
namespace sampling {  // has rows and blocks of its own

typedef Floats Logits;
typedef Ints Marks;  // of a comparison: all bits or none; and whole numbers
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef int64_t Longs __attribute__((vector_size(4 * LANES)));
typedef float LooseHalf __attribute__((vector_size(2 * LANES), aligned(4), may_alias));

INLINE Doubles each_of_half(double x) { return x - (Doubles){}; }

INLINE bool any(Marks marks) {
#if defined(MORAY_ISA_AVX512)
    return _mm512_movepi32_mask((__m512i)marks) != 0;
#else
    int64_t part[LANES / 2], found = 0;
    memcpy(part, &marks, sizeof part);
    for (int64_t lanes : part) found |= lanes;
    return found != 0;
#endif
}

// ---- exact_math.py ----------------------------------------------------------------------------------------------------------

constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds |x| < 2^51 to a whole number, in the lowest bits

INLINE Doubles floor_of(Doubles x) {
    const Doubles nearest = (x + MAGIC) - MAGIC;
    return nearest > x ? nearest - 1.0 : nearest;
}
INLINE Longs whole(Doubles x) { return (Longs)(x + MAGIC) - (Longs)each_of_half(MAGIC); }

constexpr double LN2_HIGH = 0.6931467056274414, LN2_LOW = 4.7493250390316726e-07;

// exp of N vectors in place. Side by side, since each is one chain of operations that wait for one another.
template <int N>
INLINE void exp_of_negative(Doubles *x) {
    Doubles r[N], power[N], series[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        const Doubles bounded = x[i] < -700.0 ? each_of_half(-701.0) : x[i];
        const Doubles n = floor_of(bounded * 1.4426950408889634 + 0.5);
        r[i] = (bounded - n * LN2_HIGH) - n * LN2_LOW;
        power[i] = (Doubles)((whole(n) + 1023) << 52);
        series[i] = each_of_half(1.0);
    }
#pragma GCC unroll 13
    for (int k = 13; k > 0; k--)
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) series[i] = series[i] * r[i] * (1.0 / k) + 1.0;
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) x[i] = x[i] < -700.0 ? each_of_half(0.0) : series[i] * power[i];
}

// Of a positive normal number.
INLINE double log_of(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    const int64_t n = (bits - 0x3FE6A09E667F3BCD) >> 52;
    bits -= n * (INT64_C(1) << 52);
    double m;
    memcpy(&m, &bits, 8);
    const double s = (m - 1.0) / (m + 1.0), square = s * s, wide = static_cast<double>(n);
    double series = 0.0;
    for (int k = 10; k >= 0; k--) series = series * square + 1.0 / (2 * k + 1);
    return wide * LN2_HIGH + (2.0 * s * series + wide * LN2_LOW);
}

// ---- noise ------------------------------------------------------------------------------------------------------------------

template <typename Word>
INLINE Word mixed(Word x) {  // `_mix`; Word: Words or uint32_t, whose products wrap by themselves
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

INLINE double noise_of(int32_t token, uint32_t noise_key) {
    const uint32_t bits = mixed(mixed(static_cast<uint32_t>(token)) ^ noise_key);
    return -log_of(-log_of((bits + 0.5) * 0x1p-32));
}

// Not less than the noise of some tokens but for rounding, 1e-4 at most, and no more than 0.06 above it where it is large.
// With u = (bits + 1/2) 2^-32 and t = ~bits, -log(-log u) <= -log(1 - u) = (32 - log2(t + 1/2)) ln 2. The bits of a float y
// are a chord under log2: log2 y >= bits of y / 2^23 - 127; y is t halved, to be a signed integer (of 0, the bound is 109).
INLINE Logits noise_bound(Words tokens, uint32_t noise_key) {
    const Words bits = mixed(mixed(tokens) ^ noise_key);
    const Logits y = __builtin_convertvector((Marks)(~bits >> 1), Logits);
    const float ln2 = 0.693147181f;
    return ln2 * 158.0f - __builtin_convertvector((Marks)y, Logits) * (ln2 / (1 << 23));
}

constexpr double FARTHEST_WINNER = 28.0;  // noise lies between -3.14 and 22.88: a token farther below the peak loses to it
constexpr float SLACK = 1e-3f;            // far more than the rounding of what noise bounds are compared with in fp32
constexpr double WEIGHTLESS = 34.0;       // so far below the peak, mass is 0: exp(-34) 2^45 is 0.06, rounded

// ---- a row ------------------------------------------------------------------------------------------------------------------

constexpr int BLOCK = 2 * LANES;  // logits that are worked on at once; half as many fp64 are in a vector

struct Row {
    const float *logits;
    int32_t width, whole_blocks;  // both in tokens
    double temperature;
    float peak, lowest;  // the largest logit, and the smallest but -infinity
    alignas(64) float tail[BLOCK];  // the logits that do not fill a block, then -infinity
};

// Calls work(first token, their logits) for blocks or, with STEP = LANES, for vectors of a row. Past its end are -infinities.
template <int STEP, typename Work>
INLINE void over(const Row &row, Work work) {
    for (int32_t token = 0; token < row.whole_blocks; token += STEP) work(token, row.logits + token);
    for (int32_t token = row.whole_blocks; token < row.width; token += STEP) work(token, row.tail + token - row.whole_blocks);
}

// Fills in all but what is given; false if the peak is not finite, or something is a NaN.
INLINE bool survey(Row &row) {
    row.whole_blocks = row.width - row.width % BLOCK;
    for (int i = 0; i < BLOCK; i++)
        row.tail[i] = row.whole_blocks + i < row.width ? row.logits[row.whole_blocks + i] : -INFINITY;
    Logits largest = all(-INFINITY), smallest = all(INFINITY);
    Marks bad = {};
    over<LANES>(row, [&](int32_t, const float *at) __attribute__((always_inline)) {
        const Logits x = load(at), finite = x == all(-INFINITY) ? all(INFINITY) : x;
        bad |= x != x;
        largest = x > largest ? x : largest;
        smallest = finite < smallest ? finite : smallest;
    });
    row.peak = -INFINITY;
    row.lowest = INFINITY;
    for (int i = 0; i < LANES; i++) {
        row.peak = fmaxf(row.peak, largest[i]);
        row.lowest = fminf(row.lowest, smallest[i]);
    }
    return !any(bad) && row.peak > -INFINITY && row.peak < INFINITY;
}

// Of equals the first.
INLINE int32_t first_at_peak(const Row &row) {
    int32_t token = 0;
    while (token < row.whole_blocks && !any(load(row.logits + token) == all(row.peak))) token += LANES;
    while (row.logits[token] != row.peak) token++;
    return token;
}

// The logit so far below the peak, times the temperature. A logit is less than this rounded number only if it is less than the
// number itself: rounding keeps the order.
INLINE float below_peak(const Row &row, double distance) {
    return static_cast<float>(fmax(row.peak - distance * row.temperature, -FLT_MAX));
}

// The probability masses of a block.
INLINE void store_masses(const Row &row, const float *at, int64_t *masses) {
    Doubles x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const LooseHalf logits = *reinterpret_cast<const LooseHalf *>(at + i * LANES / 2);
        x[i] = (__builtin_convertvector(logits, Doubles) - static_cast<double>(row.peak)) / row.temperature;
    }
    exp_of_negative<4>(x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Longs mass = whole(floor_of(x[i] * 0x1p45 + 0.5));
        memcpy(masses + i * LANES / 2, &mass, sizeof mass);
    }
}

// ---- borders ----------------------------------------------------------------------------------------------------------------

// Tokens with larger logits stay, and of equals those up to `last`.
struct Border {
    float logit;
    int32_t last;
};
constexpr Border NO_BORDER = {-FLT_MAX, INT32_MAX};  // -infinity never wins, whoever keeps it

struct Candidate {
    float logit;
    int32_t token;
    int64_t weight;
};

// A float's bits in the order of the values; both zeros are one.
INLINE uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == 0.0f ? 0x80000000u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The part, from `at` on, with which the sum of parts reaches `wanted`; of that, what the parts before it leave.
INLINE int passed(const int64_t *parts, int at, int step, int64_t &wanted) {
    for (; parts[at] < wanted; at += step) wanted -= parts[at];
    return at;
}

// Where the weight of candidates, from the largest logit down and of equals from the first token on, reaches `wanted`: at
// most all of it. They come in the order of their tokens, and are overwritten.
INLINE Border border_among(Candidate *candidates, int32_t count, int64_t wanted) {
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t sums[256] = {};
        for (int32_t i = 0; i < count; i++) sums[ordered(candidates[i].logit) >> shift & 255] += candidates[i].weight;
        const uint32_t digit = passed(sums, 255, -1, wanted);
        int32_t left = 0;
        for (int32_t i = 0; i < count; i++)
            if ((ordered(candidates[i].logit) >> shift & 255) == digit) candidates[left++] = candidates[i];
        count = left;
    }
    // Equal logits have equal weights, and theirs is not 0: they reach what was wanted.
    const int64_t weight = candidates[0].weight;
    return {candidates[0].logit, candidates[(wanted + weight - 1) / weight - 1].token};
}

// The border where tokens that are not below `least` reach a weight: top_k tokens or, if MASS, the share top_p of their mass.
// Buckets divide the logits that matter evenly, nearest the peak first; the last one holds all others too.
template <bool MASS>
INLINE Border border_of(const Row &row, float least, int64_t top_k, double top_p, Candidate *candidates) {
    constexpr int BUCKETS = 2048, OUTSIDE = BUCKETS;
    const double reach = WEIGHTLESS * row.temperature, all_of_them = static_cast<double>(row.peak) - row.lowest;
    const double span = fmax(fmin(reach, all_of_them), FLT_MIN);  // of equal logits the difference may be -0
    const float scale = static_cast<float>(fmin((BUCKETS - 1) / span, FLT_MAX));
    const Logits lowest = all(MASS ? fmaxf(least, below_peak(row, WEIGHTLESS)) : least);
    // The buckets of a block's logits; whether any counts.
    auto place = [&](const float *at, int32_t *buckets) __attribute__((always_inline)) {
        Marks some = {};
        for (int i = 0; i < BLOCK; i += LANES) {
            const Logits x = load(at + i), scaled = (row.peak - x) * scale;  // rounding keeps the order
            const Marks bucket = __builtin_convertvector(scaled < all(BUCKETS - 1) ? scaled : all(BUCKETS - 1), Marks);
            const Marks counts = x >= lowest, placed = counts ? bucket : OUTSIDE - (Marks){};
            memcpy(buckets + i, &placed, sizeof placed);
            some |= counts;
        }
        return any(some);
    };
    alignas(64) int64_t sums[BUCKETS + 1] = {}, weights[BLOCK];
    alignas(64) int32_t buckets[BLOCK];
    for (int64_t &weight : weights) weight = 1;
    over<BLOCK>(row, [&](int32_t, const float *at) __attribute__((always_inline)) {
        if (!place(at, buckets)) return;
        if (MASS) store_masses(row, at, weights);
        for (int i = 0; i < BLOCK; i++) sums[buckets[i]] += weights[i];
    });
    int64_t wanted = top_k;
    if (MASS) {
        int64_t total = 0;
        for (int i = 0; i < BUCKETS; i++) total += sums[i];
        const double share = ceil(top_p * static_cast<double>(total));
        wanted = share <= 1.0 ? 1 : share >= static_cast<double>(total) ? total : static_cast<int64_t>(share);
    }
    const int chosen = passed(sums, 0, 1, wanted);
    // Where the last bucket's tokens are out of reach, without mass or a chance to win, it makes no odds which of them stay.
    if (!MASS && chosen == BUCKETS - 1 && reach < all_of_them) return NO_BORDER;
    int32_t count = 0;
    over<BLOCK>(row, [&](int32_t token, const float *at) __attribute__((always_inline)) {
        if (!place(at, buckets)) return;
        Marks inside = {};
        for (int i = 0; i < BLOCK; i += LANES) {
            Marks placed;
            memcpy(&placed, buckets + i, sizeof placed);
            inside |= placed == chosen;
        }
        if (!any(inside)) return;
        if (MASS) store_masses(row, at, weights);
        for (int i = 0; i < BLOCK; i++)
            if (buckets[i] == chosen) candidates[count++] = {at[i], token + i, weights[i]};
    });
    return border_among(candidates, count, wanted);
}

// ---- the choice -------------------------------------------------------------------------------------------------------------

struct Best {
    double score;
    int32_t token;
};

// A token's score against the best so far, if no filter removes the token; of equals the first.
INLINE void consider(const Row &row, const moray_sampling &how, Border border, int32_t token, Best &best) {
    const float x = row.logits[token];
    if (x < border.logit || (x == border.logit && token > border.last)) return;
    const double distance = (static_cast<double>(x) - row.peak) / row.temperature;
    if (how.min_p > 0.0) {
        Doubles weight = each_of_half(distance);
        exp_of_negative<1>(&weight);
        if (!(weight[0] >= how.min_p)) return;
    }
    const double score = distance + noise_of(token, static_cast<uint32_t>(how.noise_key));
    if (score > best.score || (score == best.score && token < best.token)) best = {score, token};
}

INLINE int32_t draw(const Row &row, const moray_sampling &how, Border border) {
    Best best = {-INFINITY, 0};
    consider(row, how, border, first_at_peak(row), best);
    const float cooling = static_cast<float>(fmin(1.0 / row.temperature, FLT_MAX));
    const Logits least = all(fmaxf(border.logit, below_peak(row, FARTHEST_WINNER)));
    Marks lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    over<LANES>(row, [&](int32_t token, const float *at) __attribute__((always_inline)) {
        const Logits x = load(at);
        Marks hopeful = x >= least;
        if (!any(hopeful)) return;
        const Logits gap = x - row.peak, distance = (gap > all(-FLT_MAX) ? gap : all(-FLT_MAX)) * cooling;
        const Logits bound = distance + noise_bound((Words)(lanes + token), static_cast<uint32_t>(how.noise_key));
        hopeful &= bound >= all(static_cast<float>(best.score) - SLACK);
        if (!any(hopeful)) return;
        for (int i = 0; i < LANES; i++)
            if (hopeful[i]) consider(row, how, border, token + i, best);
    });
    return best.token;
}

static int32_t sample_row(const float *logits, int32_t width, const moray_sampling &how) {
    Row row = {logits, width, 0, how.temperature, 0.0f, 0.0f, {}};
    if (!survey(row)) return -1;
    if (!(how.temperature > 0.0)) return first_at_peak(row);
    const bool by_count = how.top_k > 0 && how.top_k < width, by_mass = how.top_p < 1.0;
    Border border = NO_BORDER;
    if (by_count || by_mass) {
        auto *candidates = static_cast<Candidate *>(moray::scratch(moray::TOTALS, sizeof(Candidate) * (width + BLOCK)));
        // Of equals at top-k's border all stay. What fills up the last block is -infinity, and comes after all others.
        if (by_count) border.logit = fmaxf(-FLT_MAX, border_of<false>(row, -INFINITY, how.top_k, 0.0, candidates).logit);
        if (by_mass) border = border_of<true>(row, border.logit, 0, how.top_p, candidates);
    }
    return draw(row, how, border);
}

struct SamplingJob {
    const float *logits;
    int64_t stride;
    int32_t rows, width;
    const moray_sampling *how;
    int32_t *tokens;
    moray::Stage stage;
};

static void sampling_task(void *argument) {
    SamplingJob &job = *static_cast<SamplingJob *>(argument);
    moray::share(job.stage, job.rows, [&](int32_t row) {
        job.tokens[row] = sample_row(job.logits + row * job.stride, job.width, job.how[row]);
    });
    moray::wait_for(job.stage, job.rows);
}

static void sample(const float *logits, int64_t stride, int32_t rows, int32_t width, const moray_sampling *how,
                   int32_t *tokens) {
    SamplingJob job = {logits, stride, rows, width, how, tokens, {}};
    moray::run(sampling_task, &job);
}

}  // namespace sampling
}  // namespace
#endif
