// SwiGLU MLPs (Shazeer, 2020, arXiv:2002.05202), one for all rows or one for each run of pairs: gate and up projection of the
// same outputs are computed together, so that the activation is applied to sums that are still in cache, in fp32.
#ifndef MORAY_MLP_H
#define MORAY_MLP_H

#include "gemm.h"

namespace {

constexpr int HALF = GROUP / 2;  // tiles of the gate in a group; as many of the up projection

// Middle outputs of one group: silu(gate) * up in bf16.
template <typename Row, typename To>
INLINE void middle_group(const moray_matrix &gate_up, int group, int rows, Row row_at, To to) {
    const int half = gate_up.rows / 2 / TILE;  // tiles of the gate
    const int first = group * HALF;
    const int count = half - first < HALF ? half - first : HALF;
    Tiles tiles;
    tiles.count = 2 * count;
    for (int t = 0; t < count; t++) {
        for (int part = 0; part < 2; part++) {
            tiles.data[part * count + t] = tile_of(gate_up, part * half + first + t);
            tiles.scales[part * count + t] = scales_of(gate_up, part * half + first + t);
        }
    }
    float *totals = static_cast<float *>(moray::scratch(moray::TOTALS, sizeof(float) * ROW_BLOCK * GROUP * TILE));
    const bf16 *x[ROW_BLOCK];
    for (int begin = 0; begin < rows; begin += ROW_BLOCK) {
        const int now = rows - begin < ROW_BLOCK ? rows - begin : ROW_BLOCK;
        for (int r = 0; r < now; r++) x[r] = row_at(begin + r);
        product(x, now, tiles, gate_up.kind, gate_up.cols, totals, GROUP * TILE);
        for (int r = 0; r < now; r++) {
            const float *gate = totals + r * GROUP * TILE, *up = gate + count * TILE;
            bf16 *out = to(begin + r) + first * TILE;
            for (int t = 0; t < count; t++)
                narrow16(out + t * TILE, silu(load(gate + t * TILE)) * load(up + t * TILE));
        }
    }
}

struct Run {
    int begin, count;  // pairs
    const moray_mlp *mlp;
};

struct GroupedMlp {
    const bf16 *hidden_states;
    const int32_t *rows;
    const Run *runs;
    int count;
    bf16 *middle;
    bf16 *out;
    moray::Stage middles, outs;
};

// Pieces of work are numbered run after run, so that threads read one matrix after the other.
static void grouped_mlp_task(void *argument) {
    GroupedMlp &job = *static_cast<GroupedMlp *>(argument);
    const moray_mlp &shape = *job.runs[0].mlp;
    const int64_t hidden = shape.down.rows, width = shape.down.cols;
    const int middles = (shape.gate_up.rows / 2 / TILE + HALF - 1) / HALF, outs = groups_in(shape.down);
    moray::share(job.middles, job.count * middles, [&](int piece) {
        const Run &run = job.runs[piece / middles];
        middle_group(
            run.mlp->gate_up, piece % middles, run.count,
            [&](int r) { return job.hidden_states + job.rows[run.begin + r] * hidden; },
            [&](int r) { return job.middle + (run.begin + r) * width; });
    });
    moray::wait_for(job.middles, job.count * middles);
    moray::share(job.outs, job.count * outs, [&](int piece) {
        const Run &run = job.runs[piece / outs];
        multiply_group(
            run.mlp->down, piece % outs, run.count, [&](int r) { return job.middle + (run.begin + r) * width; },
            [&](int r, int first, int outputs, const float *totals) {
                keep_bf16(job.out + (run.begin + r) * hidden + first, totals, outputs);
            });
    });
    moray::wait_for(job.outs, job.count * outs);
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
    const size_t run_bytes = (sizeof(Run) * runs + 63) & ~static_cast<size_t>(63);
    uint8_t *memory = static_cast<uint8_t *>(moray::scratch(moray::SHARED, run_bytes + sizeof(bf16) * pairs * width));
    Run *table = reinterpret_cast<Run *>(memory);
    int run = -1;
    for (int p = 0; p < pairs; p++) {
        if (p == 0 || slots[p] != slots[p - 1]) table[++run] = {p, 0, mlps + slots[p]};
        table[run].count++;
    }
    GroupedMlp job = {hidden_states, rows, table, runs, reinterpret_cast<bf16 *>(memory + run_bytes), out, {}, {}};
    moray::run(grouped_mlp_task, &job);
    return 0;
}

struct Swiglu {
    const bf16 *x;
    int32_t tokens;
    const moray_mlp *mlp;
    bf16 *middle;
    float *out;
    moray::Stage middles, outs;
};

static void swiglu_task(void *argument) {
    Swiglu &job = *static_cast<Swiglu *>(argument);
    const moray_matrix &gate_up = job.mlp->gate_up, &down = job.mlp->down;
    const int64_t hidden = gate_up.cols, width = down.cols;
    const int middles = (gate_up.rows / 2 / TILE + HALF - 1) / HALF, outs = groups_in(down);
    moray::share(job.middles, middles, [&](int piece) {
        middle_group(
            gate_up, piece, job.tokens, [&](int r) { return job.x + r * hidden; },
            [&](int r) { return job.middle + r * width; });
    });
    moray::wait_for(job.middles, middles);
    moray::share(job.outs, outs, [&](int piece) {
        multiply_group(
            down, piece, job.tokens, [&](int r) { return job.middle + r * width; },
            [&](int r, int first, int outputs, const float *totals) {
                // As if rounded to bf16 and widened: what an expert elsewhere would have sent.
                float *to = job.out + static_cast<int64_t>(r) * down.rows + first;
                for (int i = 0; i < outputs; i++) to[i] = widen(narrow(totals[i]));
            });
    });
    moray::wait_for(job.outs, outs);
}

static void swiglu(const bf16 *x, int32_t tokens, const moray_mlp *mlp, float *out) {
    bf16 *middle = static_cast<bf16 *>(moray::scratch(moray::SHARED, sizeof(bf16) * tokens * mlp->down.cols));
    if (!tokens) return;
    Swiglu job = {x, tokens, mlp, middle, out, {}, {}};
    moray::run(swiglu_task, &job);
}

}  // namespace
#endif
