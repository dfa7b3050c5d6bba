"""Where a model computes, and in what: one value that the loader, the router and the expert hosts are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    """

    device: torch.device
    dtype: torch.dtype
    keep_fp8: bool = False
    fp8_kv: bool = False
    packed: bool = False

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
