"""One GPU of each generation that kernels are compiled for, with the figures a prediction needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of one GPU.

    Attributes:
        name: as sold.
        multiprocessors: streaming multiprocessors.
        clock_ghz: boost clock.
        bandwidth: of its memory, bytes per second.
        flops: dense peak per second by arithmetic; "fp8" is absent where the tensor cores have none.
        shared_memory: most bytes one program may use.
        shared_memory_per_multiprocessor: bytes that the programs on one multiprocessor share.
    """

    name: str
    multiprocessors: int
    clock_ghz: float
    bandwidth: float
    flops: dict[str, float]
    shared_memory: int
    shared_memory_per_multiprocessor: int


GPUS = {
    80: Gpu("A100 80GB", 108, 1.41, 2039e9, {"fp16": 312e12, "fp32": 19.5e12}, 166912, 167936),
    86: Gpu("RTX A6000", 84, 1.80, 768e9, {"fp16": 155e12, "fp32": 38.7e12}, 101376, 102400),
    89: Gpu("L40S", 142, 2.52, 864e9, {"fp8": 733e12, "fp16": 362e12, "fp32": 91.6e12}, 101376, 102400),
    90: Gpu("H100 SXM", 132, 1.98, 3350e9, {"fp8": 1979e12, "fp16": 989e12, "fp32": 67e12}, 232448, 233472),
    100: Gpu("B200", 148, 1.97, 8000e9, {"fp8": 4500e12, "fp16": 2250e12, "fp32": 75e12}, 232448, 233472),
    120: Gpu("RTX PRO 6000", 188, 2.62, 1792e9, {"fp8": 1008e12, "fp16": 504e12, "fp32": 126e12}, 101376, 102400),
}
"""By architecture. Sources: NVIDIA's data sheets (dense rates, no sparsity) and, for shared memory, the CUDA C++ programming
guide's table of compute capabilities: 163, 99, 99, 227, 227 and 99 KiB a block."""
