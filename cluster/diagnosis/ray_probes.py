"""Probes on every node of a running Ray cluster: the only part of an examination that knows Ray."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ...actors.links.sockets import split_endpoint
from ...configs.errors import ClusterError, ConfigError
from .. import private_ray
from .cluster_checks import RayNode
from .node_probe import NodeProbe

_CALLS = 4
"""Calls that a probe may have in hand; each is a thread."""

_REACHABLE_S = 5.0
"""For one connection to Ray's head."""

_HEAD = "node:__internal_head__"
"""The resource by which Ray marks its head."""


@dataclass(frozen=True, slots=True)
class RayHandle:
    """A node's probe; the actor comes up while it is being asked."""

    node: str
    ray: RayNode
    actor: Any

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        """See `NodeHandle`."""
        future: Future[Any] = getattr(self.actor, method).remote(*arguments).future()
        return future


@contextlib.contextmanager
def ray_probes(address: str) -> Iterator[list[RayHandle]]:
    """A probe on every node that is alive, the head's first; they end with the context.

    Raises:
        ClusterError: Ray is not there, or has no node.
    """
    if address != "auto":
        _check_reachable(address)
    private_ray.use_token_for(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address} cannot be reached: {error}") from error
    try:
        yield [_spawn(node, name) for name, node in named(ray.nodes()).items()]
    finally:
        ray.shutdown()  # and with this driver its actors


def _check_reachable(address: str) -> None:
    """Ray itself tries for two minutes where nobody listens, and says little of it."""
    try:
        socket.create_connection(split_endpoint(address), timeout=_REACHABLE_S).close()
    except (OSError, ConfigError) as error:
        raise ClusterError(
            f"Ray at {address} cannot be reached: {error}; give the address that `ray start --head` printed, or `auto`"
        ) from error


def named(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Name -> entry of `ray.nodes()`, of those that are alive, the head's first; by their addresses.

    Raises:
        ClusterError: none is.
    """
    alive = [node for node in nodes if node.get("Alive")]
    if not alive:
        raise ClusterError("the Ray cluster has no node that is alive")
    found: dict[str, Mapping[str, Any]] = {}
    for node in sorted(alive, key=lambda node: (_HEAD not in node["Resources"], node["NodeManagerAddress"])):
        name = address = str(node["NodeManagerAddress"])
        number = 1
        while name in found:  # several nodes on one machine, as in tests
            number += 1
            name = f"{address}/{number}"
        found[name] = node
    return found


def _spawn(node: Mapping[str, Any], name: str) -> RayHandle:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = (
        ray.remote(NodeProbe)
        .options(
            num_cpus=0,
            max_restarts=0,
            max_concurrency=_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
    )
    return RayHandle(name, RayNode(str(node["NodeManagerAddress"]), dict(node["Resources"])), actor)
