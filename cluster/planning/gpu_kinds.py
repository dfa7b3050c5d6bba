"""The GPUs a plan knows by name: how much memory each has, and how fast it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...configs.errors import ConfigError
from ...kernels.gpus import GPUS

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GpuKind:
    """One kind of GPU.

    Attributes:
        name: as written in `--nodes`.
        architecture: 10 x major + minor compute capability.
        memory_bytes: that a program can see, which is less than what it is sold with where ECC takes some.
        bandwidth: of its memory, bytes per second.
        flops: dense peak per second by arithmetic, as in `kernels/gpus.py`; "fp8" is absent where there is none.
    """

    name: str
    architecture: int
    memory_bytes: int
    bandwidth: float
    flops: Mapping[str, float]

    def peak(self, arithmetic: str) -> float:
        """Multiply-adds count twice; FP8 weights are multiplied in fp16 where the tensor cores have no FP8."""
        return self.flops.get(arithmetic, self.flops["fp16"])


def _published(name: str, architecture: int, memory_mib: int) -> GpuKind:
    """One whose speed `kernels/gpus.py` has."""
    gpu = GPUS[architecture]
    return GpuKind(name, architecture, memory_mib * _MIB, gpu.bandwidth, gpu.flops)


def _kind(
    name: str, architecture: int, memory_mib: int, gb_per_s: float, fp16: float, fp8: float | None = None
) -> GpuKind:
    """Rates in units of 1e12 a second, dense and accumulated in fp32."""
    flops = {"fp16": fp16 * 1e12} | ({} if fp8 is None else {"fp8": fp8 * 1e12})
    return GpuKind(name, architecture, memory_mib * _MIB, gb_per_s * 1e9, flops)


GPU_KINDS: Mapping[str, GpuKind] = {
    kind.name: kind
    for kind in (
        _kind("L4", 89, 23034, 300, 121, 242),
        _kind("A10G", 86, 23028, 600, 70),
        _kind("RTX3090", 86, 24576, 936, 71),
        _kind("RTX4090", 89, 24564, 1008, 165, 330),
        _kind("RTX5090", 120, 32607, 1792, 209, 419),
        _kind("A100-40G", 80, 40960, 1555, 312),
        _kind("A40", 86, 46068, 696, 150),
        _published("L40S", 89, 46068),
        _kind("L20", 89, 46068, 864, 119, 239),
        _published("A6000", 86, 49140),
        _kind("RTX6000Ada", 89, 49140, 960, 364, 728),
        _published("H100", 90, 81559),
        _kind("H800", 90, 81559, 3350, 989, 1979),
        _published("A100-80G", 80, 81920),
        _published("RTXPRO6000", 120, 97887),
        _kind("H20", 90, 97871, 4000, 148, 296),
        _kind("H200", 90, 143771, 4800, 989, 1979),
        _published("B200", 100, 183359),
    )
}
"""By name. Memory as `nvidia-smi` reports it (with ECC where it is on as sold), speeds from NVIDIA's data sheets."""

_OTHER_NAMES = {
    "A100": "A100-80G",
    "A10080G": "A100-80G",
    "A10080GB": "A100-80G",
    "A10040G": "A100-40G",
    "A10040GB": "A100-40G",
    "RTXA6000": "A6000",
    "4090": "RTX4090",
    "3090": "RTX3090",
    "5090": "RTX5090",
    "H100SXM": "H100",
    "H10080GB": "H100",
}


def gpu_kind(name: str) -> GpuKind:
    """The kind of this name; case, spaces and dashes do not matter, nor does "NVIDIA" or "GeForce" before it.

    Raises:
        ConfigError: there is none in the table.
    """
    plain = _plain(name)
    known = {_plain(kind): kind for kind in GPU_KINDS} | _OTHER_NAMES
    if plain in known:
        return GPU_KINDS[known[plain]]
    raise ConfigError(
        f"GPU {name!r} is not known; one of {', '.join(GPU_KINDS)} is, or describe it in a file for `--nodes-file`: "
        "gpu: {name: ..., memory_gib: ..., bandwidth_gb_s: ..., fp16_tflops: ...}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]|NVIDIA|GEFORCE|TESLA", "", name.upper())
