// SwiGLU MLPs (Shazeer, 2020, arXiv:2002.05202), one for all rows or one for each run of pairs: gate and up projection of the
// same outputs are computed together, so that the activation is applied to sums that are still in cache, in fp32.
#ifndef MORAY_MLP_H
#define MORAY_MLP_H

#include "gemm.h"

namespace {

// Middle outputs of one group of the gate's tiles: silu(gate) * up in bf16.
template <typename Row, typename To>
INLINE void middle_group(const moray_matrix &gate_up, int group, int rows, Row row_at, To to, const uint8_t *next) {
    constexpr int WIDTH = 2 * GROUP * TILE;
    const int half = gate_up.rows / 2 / TILE;  // tiles of the gate
    const int first = group * GROUP;
    const int count = half - first < GROUP ? half - first : GROUP;
    const uint8_t *up_start = tiles_of(gate_up, half + first, count).data;
    float *totals = static_cast<float *>(moray::scratch(moray::TOTALS, sizeof(float) * ROW_BLOCK * WIDTH));
    const bf16 *x[ROW_BLOCK];
    for (int begin = 0; begin < rows; begin += ROW_BLOCK) {
        const int now = rows - begin < ROW_BLOCK ? rows - begin : ROW_BLOCK;
        for (int r = 0; r < now; r++) x[r] = row_at(begin + r);
        product_of(x, now, gate_up, first, count, up_start, totals, WIDTH);
        product_of(x, now, gate_up, half + first, count, next, totals + GROUP * TILE, WIDTH);
        for (int r = 0; r < now; r++) {
            const float *gate = totals + r * WIDTH, *up = gate + GROUP * TILE;
            bf16 *out = to(begin + r) + first * TILE;
            for (int i = 0; i < count * TILE; i += LANES) narrow_to(out + i, silu(load(gate + i)) * load(up + i));
        }
    }
}

// Groups of the gate's tiles.
INLINE int middles_in(const moray_matrix &gate_up) { return (gate_up.rows / 2 / TILE + GROUP - 1) / GROUP; }

struct Run {
    int begin, count;  // pairs
    const moray_mlp *mlp;
};

struct MlpJob {
    const bf16 *x;
    const int32_t *rows;  // of each pair, or NULL: pairs are rows
    const Run *runs;
    int count;
    bf16 *middle;
    void *out;
    moray::Stage all, *middles;  // of each run
};

// Pieces of work are numbered run after run, all middles and then all outputs, so that threads read one matrix after the other.
// For outputs a thread waits for the middles of that run alone: only for the last run's may it have to, and reads ahead then.
template <typename Keep>
INLINE void mlp_pieces(MlpJob &job, Keep keep) {
    const moray_mlp &shape = *job.runs[0].mlp;
    const int64_t hidden = shape.gate_up.cols, width = shape.down.cols;
    const int middles = middles_in(shape.gate_up), outs = groups_in(shape.down);
    const int all_middles = job.count * middles, pieces = all_middles + job.count * outs;
    const auto start = [&](int piece) -> const uint8_t * {
        if (piece >= pieces) return nullptr;
        const int out = piece - all_middles;
        return out < 0 ? start_of(job.runs[piece / middles].mlp->gate_up, piece % middles)
                       : start_of(job.runs[out / outs].mlp->down, out % outs);
    };
    int mine = 0;  // the piece after this thread's last one
    moray::share(job.all, pieces, [&](int piece, int count) { mine = piece + count; }, [&](int piece) {
        const uint8_t *next = start(piece + 1);
        const int out = piece - all_middles, number = out < 0 ? piece / middles : out / outs;
        const Run &run = job.runs[number];
        const auto middle = [&](int r) { return job.middle + (run.begin + r) * width; };
        if (out < 0) {
            const auto row = [&](int r) { return job.x + (job.rows ? job.rows[run.begin + r] : run.begin + r) * hidden; };
            middle_group(run.mlp->gate_up, piece % middles, run.count, row, middle, next);
            moray::did(job.middles[number], middles);
        } else {
            moray::wait_for(job.middles[number], middles, groups_ahead(run.mlp->down, out % outs, mine - piece));
            multiply_group(
                run.mlp->down, out % outs, run.count, middle,
                [&](int r, int first, int outputs, const float *totals) {
                    keep((run.begin + r) * static_cast<int64_t>(shape.down.rows) + first, outputs, totals);
                },
                next);
        }
    });
    moray::wait_for(job.all, pieces);
}

static void grouped_mlp_task(void *argument) {
    MlpJob &job = *static_cast<MlpJob *>(argument);
    mlp_pieces(job, [&](int64_t at, int outputs, const float *totals) {
        keep_bf16(static_cast<bf16 *>(job.out) + at, totals, outputs);
    });
}

static int grouped_mlp(const bf16 *hidden_states, int32_t tokens, const int32_t *rows, const int32_t *slots, int32_t pairs,
                       const moray_mlp *mlps, int32_t num_slots, bf16 *out) {
    int runs = 0;
    for (int p = 0; p < pairs; p++) {
        if (rows[p] < 0 || rows[p] >= tokens) return -1;
        if (slots[p] < 0 || slots[p] >= num_slots || !mlps[slots[p]].gate_up.data) return -2;
        runs += p == 0 || slots[p] != slots[p - 1];
    }
    if (!pairs) return 0;
    const int64_t width = mlps[slots[0]].down.cols;
    const size_t run_bytes = ((sizeof(Run) + sizeof(moray::Stage)) * runs + 63) & ~static_cast<size_t>(63);
    uint8_t *memory = static_cast<uint8_t *>(moray::scratch(moray::SHARED, run_bytes + sizeof(bf16) * pairs * width));
    Run *table = reinterpret_cast<Run *>(memory);
    int run = -1;
    for (int p = 0; p < pairs; p++) {
        if (p == 0 || slots[p] != slots[p - 1]) table[++run] = {p, 0, mlps + slots[p]};
        table[run].count++;
    }
    moray::Stage *middles = reinterpret_cast<moray::Stage *>(table + runs);
    memset(middles, 0, sizeof(moray::Stage) * runs);
    MlpJob job = {hidden_states, rows, table, runs, reinterpret_cast<bf16 *>(memory + run_bytes), out, {}, middles};
    moray::run(with_products<grouped_mlp_task>, &job);
    return 0;
}

static void swiglu_task(void *argument) {
    MlpJob &job = *static_cast<MlpJob *>(argument);
    mlp_pieces(job, [&](int64_t at, int outputs, const float *totals) {
        // As if rounded to bf16 and widened: what an expert elsewhere would have sent.
        float *to = static_cast<float *>(job.out) + at;
        for (int i = 0; i < outputs; i++) to[i] = widen(narrow(totals[i]));
    });
}

static void swiglu(const bf16 *x, int32_t tokens, const moray_mlp *mlp, float *out) {
    if (!tokens) return;
    bf16 *middle = static_cast<bf16 *>(moray::scratch(moray::SHARED, sizeof(bf16) * tokens * mlp->down.cols));
    const Run all = {0, tokens, mlp};
    moray::Stage middles = {};
    MlpJob job = {x, nullptr, &all, 1, middle, out, {}, &middles};
    moray::run(with_products<swiglu_task>, &job);
}

}  // namespace
#endif
