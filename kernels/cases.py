"""What is compiled ahead of time: the form in which every kernel lists its launches for `kernels/codegen.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .launch import Config, Kernel

Arithmetic = Literal["fp8", "fp16", "fp32"]
"""Which peak rate bounds the multiplications; "fp16" stands for bf16 too."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch costs, for the prediction against the roofline.

    Attributes:
        bytes: read from and written to GPU memory, each byte once.
        flops: 2 per multiply-add.
        programs: how many programs are started.
        iterations: passes of one program through its main loop (1 where there is none).
    """

    bytes: float
    flops: float
    programs: float
    iterations: float


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel as it is launched for DeepSeek-R1's sizes on one GPU generation, and what its machine code must be like.

    Attributes:
        name: readable, e.g. "block_gemm 7168x2048 decode".
        kernel: the kernel.
        architecture: one of `ARCHITECTURES`.
        arguments: name -> Triton type of every parameter that is no constant, in order: "*bf16", "*fp8e4nv", "i32", "fp32".
        config: launch configuration, from the same table the wrapper reads.
        constants: compile-time constants besides the configuration's tiles.
        unaligned: arguments a launch cannot promise to be multiples of 16; pointers and strides usually are.
        tensor_core: prefix of the SASS instruction that must occur, e.g. "QGMMA"; None for kernels without products.
        max_loop_instructions: bound on the SASS instructions of the main loop (of the whole kernel where there is none).
        may_spill: whether registers may be spilled to local memory; never in decode.
        arithmetic: which peak rate bounds the work.
        work: cost of one layer of DeepSeek-R1 at a number of tokens, or None where this launch is not used for so many.
    """

    name: str
    kernel: Kernel
    architecture: int
    arguments: Mapping[str, str]
    config: Config
    max_loop_instructions: int
    constants: Mapping[str, object] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()
    tensor_core: str | None = None
    may_spill: bool = False
    arithmetic: Arithmetic = "fp32"
    work: Callable[[int], Work | None] | None = None

    def __str__(self) -> str:
        return f"{self.name} sm_{self.architecture}"
