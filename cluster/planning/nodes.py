"""The machines a plan is for: from `--nodes 3x8xL40S`, from a YAML file, or from a running Ray cluster (`ray_nodes.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...configs.errors import ConfigError
from .gpu_kinds import GpuKind, gpu_kind

GIB = 1 << 30
CPU = "cpu"
"""In place of a GPU's name: nodes without any."""

_GROUP = re.compile(r"(\d+)x(\d+)x([^,]+)|(\d+)x(cpu)(?::(\d+(?:\.\d+)?)(?:GiB|G)?)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes that are alike. What is None is not known: a plan then assumes something, and says so.

    Attributes:
        name: of the group; nodes are `name-0`, `name-1`, ...
        count: nodes.
        gpus: on each.
        gpu: their kind; None on nodes without any.
        memory_bytes: of each node's own memory.
        memory_bandwidth: of each node's own memory, bytes per second.
        cpu_flops: of each node's CPUs, per second.
        network: bytes per second that a node can send, and receive at the same time.
        disk: bytes per second that a node reads from where the checkpoint is.
        price: of one node an hour, in whatever currency.
    """

    name: str
    count: int
    gpus: int = 0
    gpu: GpuKind | None = None
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    cpu_flops: float | None = None
    network: float | None = None
    disk: float | None = None
    price: float | None = None

    def __str__(self) -> str:
        return f"{self.count}x{self.gpus}x{self.gpu.name}" if self.gpu else f"{self.count}x{CPU}"


@dataclass(frozen=True, slots=True)
class Node:
    """One of them."""

    name: str
    group: NodeGroup


def nodes_of(groups: Sequence[NodeGroup]) -> list[Node]:
    """Every node, group after group."""
    return [Node(f"{group.name}-{index}", group) for group in groups for index in range(group.count)]


def parse_nodes(text: str) -> tuple[NodeGroup, ...]:
    """Nodes as written in `--nodes`: NODESxGPUSxKIND, or NODESxcpu:GiB for nodes without GPUs, with commas between.

    Raises:
        ConfigError: it is not written so, or a kind is not known.
    """
    groups = []
    for index, part in enumerate(text.split(",")):
        found = _GROUP.fullmatch(part.strip())
        if found is None:
            raise ConfigError(
                f"--nodes {part.strip()!r}: must be NODESxGPUSxKIND, as in 3x8xL40S, or NODESxcpu:GiB for nodes without "
                "GPUs, as in 2xcpu:512; several with commas between"
            )
        count, gpus, kind, cpu_count, cpu, memory = found.groups()
        nodes = int(cpu_count if cpu else count)
        if not nodes or gpus == "0":
            raise ConfigError(
                f"--nodes {part.strip()!r}: must have at least one node, and one GPU on each, or be NODESxcpu"
            )
        name = f"node{index}"
        if cpu:
            groups.append(NodeGroup(name, nodes, memory_bytes=int(float(memory) * GIB) if memory else None))
        else:
            groups.append(NodeGroup(name, nodes, gpus=int(gpus), gpu=gpu_kind(kind.strip())))
    return tuple(groups)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _GpuFigures(_Section):
    name: str
    architecture: int = 89
    memory_gib: float = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    fp16_tflops: float = Field(gt=0)
    fp8_tflops: float | None = Field(default=None, gt=0)


class _Group(_Section):
    name: str | None = None
    count: int = Field(default=1, ge=1)
    gpus: int = Field(default=0, ge=0)
    gpu: str | _GpuFigures | None = None
    memory_gib: float | None = Field(default=None, gt=0)
    memory_bandwidth_gb_s: float | None = Field(default=None, gt=0)
    cpu_tflops: float | None = Field(default=None, gt=0)
    network_gbit_s: float | None = Field(default=None, gt=0)
    disk_gb_s: float | None = Field(default=None, gt=0)
    price_per_hour: float | None = Field(default=None, ge=0)


class _File(_Section):
    nodes: list[_Group] = Field(min_length=1)


def load_nodes(path: Path) -> tuple[NodeGroup, ...]:
    """Read a file such as

        nodes:
          - {name: rack, count: 3, gpus: 8, gpu: L40S, memory_gib: 512, network_gbit_s: 100, disk_gb_s: 5, price_per_hour: 9}
          - {count: 1, memory_gib: 64}

    Raises:
        ConfigError: it cannot be read, or says something that is not understood.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        file = _File.model_validate(raw)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(p) for p in e['loc']) or 'file'} = {e['input']!r}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError(f"{path}: " + "; ".join(problems)) from None
    groups = tuple(_group(group, index, path) for index, group in enumerate(file.nodes))
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: nodes: names {', '.join(names)}: each group must have one of its own")
    return groups


def _group(found: _Group, index: int, path: Path) -> NodeGroup:
    if bool(found.gpus) != (found.gpu is not None):
        raise ConfigError(
            f"{path}: nodes.{index}: gpus = {found.gpus} and gpu = {found.gpu!r}: give both, or none of them"
        )
    gpu, kind = found.gpu, None
    if isinstance(gpu, _GpuFigures):
        flops = {"fp16": gpu.fp16_tflops * 1e12} | ({"fp8": gpu.fp8_tflops * 1e12} if gpu.fp8_tflops else {})
        kind = GpuKind(gpu.name, gpu.architecture, int(gpu.memory_gib * GIB), gpu.bandwidth_gb_s * 1e9, flops)
    elif gpu is not None:
        kind = gpu_kind(gpu)
    return NodeGroup(
        name=found.name or f"node{index}",
        count=found.count,
        gpus=found.gpus,
        gpu=kind,
        memory_bytes=_scaled_int(found.memory_gib, GIB),
        memory_bandwidth=_scaled(found.memory_bandwidth_gb_s, 1e9),
        cpu_flops=_scaled(found.cpu_tflops, 1e12),
        network=_scaled(found.network_gbit_s, 1e9 / 8),
        disk=_scaled(found.disk_gb_s, 1e9),
        price=found.price_per_hour,
    )


def with_figures(
    groups: Sequence[NodeGroup],
    *,
    memory_gib: float | None = None,
    network_gbit_s: float | None = None,
    disk_gb_s: float | None = None,
    price: float | None = None,
) -> tuple[NodeGroup, ...]:
    """The groups with what flags say of every node; `price` is of all nodes together, an hour."""
    total = sum(group.count for group in groups)
    changes: dict[str, Any] = {
        "memory_bytes": _scaled_int(memory_gib, GIB),
        "network": _scaled(network_gbit_s, 1e9 / 8),
        "disk": _scaled(disk_gb_s, 1e9),
        "price": None if price is None else price / total,
    }
    given = {field: value for field, value in changes.items() if value is not None}
    return tuple(replace(group, **given) for group in groups)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _scaled_int(value: float | None, unit: int) -> int | None:
    return None if value is None else int(value * unit)
