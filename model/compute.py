"""Where a model computes, and in what: one value that the loader, the router and the expert hosts are given."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..configs.errors import ConfigError
from ..kernels.cpu.library import Instructions, loaded, native


@dataclass(frozen=True, slots=True)
class Compute:
    """What a process computes with.

    Attributes:
        device: where weights, KV cache and activations are.
        dtype: of activations, and of every weight that is not kept in FP8.
        keep_fp8: FP8 weights stay as stored, and are multiplied with activations quantised to FP8 (W8A8); otherwise they
            are decoded to `dtype` when they are loaded.
        packed: weights are packed for the native CPU kernels when they are loaded, FP8 ones as FP8 if `keep_fp8`; activations
            are bf16 and stay so (W8A16).
        fp8_kv: KV pages hold FP8 latents with a scale for every 128 of them, instead of `dtype`.
        instructions: what the native CPU kernels are to compute with, by its name in deployments; `auto` is the best that the
            machine has. See `use_instructions`.
    """

    device: torch.device
    dtype: torch.dtype
    keep_fp8: bool = False
    fp8_kv: bool = False
    packed: bool = False
    instructions: str = "auto"

    def __post_init__(self) -> None:
        if self.packed and (self.device.type not in ("cpu", "meta") or self.dtype != torch.bfloat16 or self.fp8_kv):
            raise ValueError("packed weights are for CPUs, bfloat16 activations and KV pages in bfloat16")

    @classmethod
    def on_cpu(cls, dtype: torch.dtype = torch.float32) -> Compute:
        """Plain arithmetic on the CPU: every weight decoded, since torch has no useful FP8 arithmetic there."""
        return cls(torch.device("cpu"), dtype)

    @classmethod
    def native(cls) -> Compute:
        """The native CPU kernels, with FP8 weights as they are."""
        return cls(torch.device("cpu"), torch.bfloat16, keep_fp8=True, packed=True)


def use_instructions(compute: Compute) -> None:
    """Have this process compute with the CPU instructions that `compute` asks for, from now on, whatever computes in it.

    Raises:
        ConfigError: this machine does not have them, or no native kernels at all.
    """
    if not compute.packed:
        return
    library, here = native(), os.uname().nodename
    if library is None:
        raise ConfigError(
            f"{here} has no CPU kernels, since there was no C++ compiler when Moray was installed there: install one (g++ or "
            "clang++), then Moray again; or set dtype: float32, which torch computes"
        )
    # By its name: a set that these kernels do not know is one that this machine does not have.
    wanted = (
        library.best if compute.instructions == "auto" else Instructions.__members__.get(compute.instructions.upper())
    )
    if wanted is None or wanted > library.best:
        best = library.best.name.lower()
        raise ConfigError(
            f"cpu_instructions = {compute.instructions!r}: the best that {here} has are {best}; set cpu_instructions: {best}, "
            "or have no processes there (`resources` of each kind)"
        )
    library.use(wanted)


def instructions_used(compute: Compute) -> str:
    """The CPU instructions that this process computes with, such as "avx2", or "torch avx2"; "" on a GPU."""
    if compute.device.type != "cpu":
        return ""
    if compute.packed:
        return loaded().used.name.lower()
    return f"torch {torch.backends.cpu.get_cpu_capability().lower()}"  # which has kernels of its own for each
