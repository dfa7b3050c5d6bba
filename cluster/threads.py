"""How many threads a process computes with: as many as keep its node's cores busy, and no more, so that none waits for a core.

Expert hosts of one node compute at the same time, each its share of a layer, and its routers wait meanwhile; then it is the
other way round. So the cores are divided among processes of one kind, and each kind has all of them; for small machines see
`host_threads_here`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .diagnosis.container import cpu_limit

if TYPE_CHECKING:
    from ..model.compute import Compute


def given_threads(threads: int | None, cpus: int, computing: Compute) -> int | None:
    """What a deployment says of a process's threads; None: its share of the cores of the node that it will be on.

    A process that more than one CPU is reserved for has those. So it is beside a GPU, where threads are of little use, and
    with torch's own CPU kernels, whose results depend on how many there are.

    Args:
        threads, cpus: of the process's section.
        computing: with what it computes.
    """
    if threads is not None:
        return threads
    return None if cpus == 1 and computing.packed else cpus


def share_of_cores(cores: int, alike: int) -> int:
    """Threads of each of `alike` processes that compute at the same time on so many cores."""
    return max(1, cores // max(1, alike))


def most_on_a_node(processes: int, labels: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many of these a node gets where they are spread over all nodes that they can be on.

    Args:
        processes: how many there are.
        labels: resources that each reserves besides CPUs and GPUs.
        nodes: what each node has of every resource.
    """
    suitable = sum(all(node.get(name, 0.0) > 0 for name in ("CPU", *labels)) for node in nodes)
    return -(-processes // max(1, suitable))


def threads_here(given: int | None, alike: int) -> int:
    """Threads of this process: as given, or its share of the cores that it may run on, as one of `alike` on this node."""
    return share_of_cores(cores_here(), alike) if given is None else given


def host_threads_here(given: int | None, alike: int) -> int:
    """The same of an expert host. Where its share is one core, and there is a core for each host, it has two threads: a step
    seldom asks hosts for equally much, and a host of one thread leaves the core idle of one that is done. (Two hosts on two
    cores of Zen 4: 1.03 times the tokens of one stream, 1.02 of eight, the same of 32.)
    """
    cores = cores_here()
    if given is None and alike <= cores < 2 * alike:
        return min(cores, 2)
    return threads_here(given, alike)


def cores_here() -> int:
    """Cores that this process may run on, no more than its container may use the time of."""
    cores = len(os.sched_getaffinity(0))
    limit = cpu_limit()
    return cores if limit is None else max(1, min(cores, round(limit)))
