"""Reads the nodes of a running Ray cluster."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...configs.errors import ClusterError, ConfigError
from .. import private_ray
from .gpu_kinds import gpu_kind
from .nodes import GIB, NodeGroup

_ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which Ray tells the kind of a node's GPUs."""


def groups_of(nodes: Sequence[Mapping[str, Any]]) -> tuple[NodeGroup, ...]:
    """The nodes that are alive, as `ray.nodes()` lists them, those that are alike together.

    Memory is what Ray may hand out, which is less than a node has: rounded down to whole GiB.

    Raises:
        ConfigError: a node has GPUs of a kind that Ray does not name or a plan does not know.
        ClusterError: no node is alive.
    """
    found: Counter[tuple[int, str, int]] = Counter()
    for node in nodes:
        if not node.get("Alive"):
            continue
        resources: Mapping[str, float] = node.get("Resources", {})
        gpus = int(resources.get("GPU", 0))
        kinds = sorted(name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR))
        if gpus and not kinds:
            raise ConfigError(
                f"node {node.get('NodeManagerAddress')}: Ray knows of {gpus} GPUs, but not of which kind; describe the nodes "
                "in a file for --nodes-file"
            )
        found[gpus, kinds[0] if gpus else "", int(resources.get("memory", 0)) // GIB * GIB] += 1
    if not found:
        raise ClusterError("the Ray cluster has no node that is alive")
    return tuple(
        NodeGroup(
            name=f"ray{index}",
            count=count,
            gpus=gpus,
            gpu=gpu_kind(kind) if gpus else None,
            memory_bytes=memory or None,
        )
        for index, ((gpus, kind, memory), count) in enumerate(sorted(found.items(), reverse=True))
    )


def read_cluster(address: str) -> tuple[NodeGroup, ...]:
    """`groups_of` the cluster at `address` ("auto": the one on this machine).

    Raises:
        ClusterError: Ray is not there.
    """
    private_ray.use_token_for(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address} cannot be reached: {error}") from error
    try:
        return groups_of(ray.nodes())
    finally:
        ray.shutdown()
