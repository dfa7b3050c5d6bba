"""All kernels, as the tests, the table of `make kernels` and `moray doctor` go through them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from . import (
    block_gemm,
    combine,
    dense_gemm,
    gate,
    grouped_gemm,
    latent,
    mla_decode,
    mla_prefill,
    permute,
    quantize,
    rms_norm,
    rope,
    sampling_kernels,
    silu_quantize,
)
from .cases import Case
from .codegen import MachineCode, compile_case
from .launch import ARCHITECTURES

MODULES = (
    rms_norm,
    sampling_kernels,
    block_gemm,
    dense_gemm,
    quantize,
    silu_quantize,
    grouped_gemm,
    permute,
    combine,
    gate,
    rope,
    latent,
    mla_decode,
    mla_prefill,
)
"""Every module that has a Triton kernel."""


def all_cases(architecture: int) -> list[Case]:
    """What is compiled ahead of time for one GPU generation; names are unique."""
    cases = [case for module in MODULES for case in module.cases(architecture)]
    assert len({case.name for case in cases}) == len(cases), [case.name for case in cases]
    return cases


@contextmanager
def compiling(architectures: Sequence[int] = ARCHITECTURES) -> Iterator[list[tuple[Case, Future[MachineCode]]]]:
    """Compile every case for these architectures, in one process a core; each future raises what its compilation did."""
    wanted = [(architecture, case) for architecture in architectures for case in all_cases(architecture)]
    # Not forked: the parent may have threads, and whatever it did to Triton must not follow.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield [(case, pool.submit(_compile_named, architecture, case.name)) for architecture, case in wanted]
        pool.shutdown(cancel_futures=True)


def _compile_named(architecture: int, name: str) -> MachineCode:
    (case,) = (case for case in all_cases(architecture) if case.name == name)
    return compile_case(case)
