"""Nodes for the tests of `moray doctor`: one where all is well, to be changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moray.cluster.diagnosis.collect import SCRATCH, SHM
from moray.cluster.diagnosis.facts import (
    CpuFacts,
    DiskFacts,
    GpuFacts,
    MemoryFacts,
    ModelFacts,
    NetworkFacts,
    NodeFacts,
    SpaceFacts,
)

GIB = 1 << 30

VERSIONS = {
    "python": "3.12.1",
    "moray": "0.1.0",
    "moray's code": "0123456789ab",
    "torch": "2.13.0+cu130",
    "ray": "2.60.0",
    "triton": "3.7.1",
    "CUDA": "13.0",
    "NCCL": "2.28.3",
    "driver": "580.65",
}

L40S = GpuFacts("NVIDIA L40S", 89, 46068 << 20, 45600 << 20, persistent=True, uncorrected_errors=0)

MODEL = ModelFacts(
    "/models/r1",
    files=163,
    total_bytes=689_000_000_000,
    config_digest="c" * 64,
    listing_digest="d" * 64,
    disk=DiskFacts(read_bytes=6_000_000_000, seconds=2.0, how="direct"),
)


def node(name: str = "10.0.0.1", **changes: Any) -> NodeFacts:
    """A GPU node where all is well, but for `changes`."""
    well = NodeFacts(
        node=name,
        hostname=f"host-{name}",
        versions=VERSIONS,
        cpu=CpuFacts(64, None, "AVX512"),
        memory=MemoryFacts(512 * GIB, 500 * GIB),
        network=NetworkFacts(name, "eth0", 9000, 100_000_000_000),
        gpus=(L40S,) * 8,
        torch_gpus=8,
        nccl=True,
        compiler="/usr/bin/cc",
        limits={"nofile": 1 << 20, "memlock": None, "nproc": None},
        spaces={SHM: SpaceFacts("/dev/shm", 256 * GIB, 255 * GIB), SCRATCH: SpaceFacts("/tmp", 900 * GIB, 800 * GIB)},
        model=MODEL,
    )
    return replace(well, **changes)


def cpu_node(name: str = "10.0.0.1", **changes: Any) -> NodeFacts:
    """One without GPUs."""
    return node(name, **{"gpus": (), "torch_gpus": 0, "nccl": False, **changes})
