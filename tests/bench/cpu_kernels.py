"""The native CPU kernels against what the memory and the arithmetic units of this machine allow.

    python tests/bench/cpu_kernels.py [--threads N] [--hidden 1024 --intermediate 512 --experts 64 --top-k 8]

A MoE layer of FP8 experts for so many tokens, by the native call that expert hosts make: a dozen layers one after the other, as
in a step, so that weights come from memory, and the interpreter's part is small. Beside them, in turn, the time that reading
the same bytes takes: a pass over a large bf16 matrix by the same threads, which is the floor. All weights are in huge pages
where Linux has any. Medians; close everything else. torch keeps to one thread, since its own look for work for milliseconds and
take the cores.

Then sampling: rows of normal logits, natively and by the definition in torch, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from moray.actors.weight_copy import resident_bytes
from moray.kernels.cpu.library import native, set_threads
from moray.kernels.cpu.matrix import linear, pack
from moray.kernels.experts import ExpertWeights, MlpWeights
from moray.kernels.fp8 import BLOCK, BlockWeight, quantize_blocks
from moray.kernels.sampling import RowSampling, _sample_reference, sample

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
LAYERS = 12
FEW_TOKENS, FEW_LAYERS = 64, 3
"""From so many tokens on, so few layers: they take long, and the interpreter's part is none."""

FLOOR_ROWS, FLOOR_COLUMNS = 131072, 1024

VOCABULARIES = (32000, 129280)
SAMPLED_ROWS = 8
SAMPLED = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (1.0, 0, 1.0, 0.0),
    "top-p": (1.0, 0, 0.95, 0.0),
    "top-k": (1.0, 50, 1.0, 0.0),
    "all": (0.6, 50, 0.95, 0.05),
}


def drawn(rows: int, columns: int) -> BlockWeight:
    """Normal values, quantized: as in a checkpoint, few of them are subnormal, which some machines multiply more slowly."""
    return BlockWeight(*quantize_blocks(torch.randn(rows, columns) * 0.02))


def drawn_layers(experts: int, hidden: int, intermediate: int) -> list[ExpertWeights]:
    """The same numbers in every layer, each time in memory of their own."""
    mlps = [(drawn(2 * intermediate, hidden), drawn(hidden, intermediate)) for _ in range(experts)]
    return [
        ExpertWeights({i: MlpWeights(pack(gate_up), pack(down)) for i, (gate_up, down) in enumerate(mlps)})
        for _ in range(LAYERS)
    ]


class Floor:
    """How fast memory is read."""

    def __init__(self) -> None:
        self.weight = pack(torch.zeros(FLOOR_ROWS, FLOOR_COLUMNS, dtype=torch.bfloat16))
        self.x = torch.zeros(1, FLOOR_COLUMNS, dtype=torch.bfloat16)

    def bytes_per_s(self) -> float:
        began = time.perf_counter()
        linear(self.x, self.weight, torch.float32)
        return self.weight.nbytes / (time.perf_counter() - began)


def measure_sampling(rounds: int) -> None:
    print("vocabulary  sampling      us a row  torch: times as long (medians)")
    for vocab in VOCABULARIES:
        logits = torch.randn(SAMPLED_ROWS, vocab) * 3
        for name, (temperature, top_k, top_p, min_p) in SAMPLED.items():
            rows = [RowSampling(temperature, top_k, top_p, min_p, seed, seed) for seed in range(SAMPLED_ROWS)]
            took: tuple[list[float], list[float]] = [], []
            for _ in range(rounds):
                for seconds, choose in zip(took, (sample, _sample_reference), strict=True):
                    began = time.perf_counter()
                    choose(logits, rows)
                    seconds.append(time.perf_counter() - began)
            ours, torchs = map(statistics.median, took)
            print(f"{vocab:10}  {name:11} {ours / SAMPLED_ROWS * 1e6:10.1f} {torchs / ours:12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    library = native()
    assert library is not None, "Moray was installed without its CPU kernels"
    assert options.intermediate % BLOCK == 0, f"--intermediate {options.intermediate}: whole blocks of {BLOCK}"
    set_threads(options.threads, packed=True)
    layers = drawn_layers(options.experts, options.hidden, options.intermediate)
    floor = Floor()
    print(f"{library.used.name}, {options.threads} threads; reading: {floor.bytes_per_s() / 1e9:.1f} GB/s")
    print("tokens  experts  us a layer (median)     GB/s  GFLOP/s  times the floor")
    one = resident_bytes(layers[0][0])
    for tokens in TOKENS:
        ids = torch.stack([torch.randperm(options.experts)[: options.top_k] for _ in range(tokens)]).flatten()
        order = ids.sort(stable=True).indices
        rows, slots = (order // options.top_k).int(), ids[order].int()
        x, out = torch.randn(tokens, options.hidden).bfloat16(), torch.empty(len(ids), options.hidden).bfloat16()
        took, ratios = [], []
        touched = len(ids.unique())
        used = [weights.packed for weights in layers[: LAYERS if tokens < FEW_TOKENS else FEW_LAYERS]]
        where = x.data_ptr(), tokens, rows.data_ptr(), slots.data_ptr(), len(ids)
        for _ in range(options.rounds):
            began = time.perf_counter()
            for table in used:
                assert table is not None
                library.grouped_mlp(*where, table.address, table.num_slots, out.data_ptr())
            took.append((time.perf_counter() - began) / len(used))
            ratios.append(took[-1] * floor.bytes_per_s() / (touched * one))
        seconds = statistics.median(took)
        flops = 6 * len(ids) * options.hidden * options.intermediate
        print(
            f"{tokens:6} {touched:8} {seconds * 1e6:20.0f} {touched * one / seconds / 1e9:8.1f} {flops / seconds / 1e9:8.0f} "
            f"{statistics.median(ratios):16.2f}"
        )
    measure_sampling(options.rounds)


if __name__ == "__main__":
    main()
