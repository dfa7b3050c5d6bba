"""Judges nodes by what one deployment asks of them: processors, labels, links, ports, and memory by `moray plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...configs.deployment import Deployment
from ...configs.errors import MorayError
from ..planning.gpu_kinds import GPU_KINDS, GpuKind, gpu_kind
from ..planning.nodes import NodeGroup
from .cluster_checks import RayNode
from .facts import GpuFacts, NodeFacts
from .findings import Finding, fail, ok, warn
from .text import gib

if TYPE_CHECKING:
    from ...model.config import ModelConfig

_SAME_SIZE = 0.1
"""Two GPUs whose names begin alike are of one kind if their memory differs by less than this share: there is an A100 of 40 GB
and one of 80 GB, and no two kinds are nearer to each other."""


def check_deployment(
    deployment: Deployment,
    config: ModelConfig | None,
    nodes: Sequence[NodeFacts],
    ray: Mapping[str, RayNode],
) -> list[Finding]:
    """What a deployment needs, against what there is.

    Args:
        config: of its model; None where that cannot be read here.
        nodes: the facts.
        ray: what Ray may hand out on each of them; empty without Ray.
    """
    return [
        *_processors(deployment, nodes, ray),
        *_labels(deployment, ray),
        *_links(deployment, nodes),
        *_front_port(deployment, nodes),
        *([] if config is None else _memory(deployment, config, nodes)),
    ]


def _processors(deployment: Deployment, nodes: Sequence[NodeFacts], ray: Mapping[str, RayNode]) -> Iterator[Finding]:
    experts, routers = deployment.experts, deployment.routers
    gpus = sum(node.gpus for node in ray.values()) if ray else float(sum(node.torch_gpus for node in nodes))
    cpus = sum(node.cpus for node in ray.values()) if ray else float(sum(node.cpu.count for node in nodes))
    if deployment.device == "cuda" and not gpus:
        yield fail("deployment", "device = 'cuda', and there is no GPU", "use cpu or auto, or add nodes with GPUs")
        return
    on_gpu = deployment.device == "cuda" or (deployment.device == "auto" and gpus > 0)
    hosts = experts.hosts + experts.standby
    wanted_cpus = hosts * experts.cpus + routers.replicas * routers.cpus + experts.cold.hosts * experts.cold.cpus
    wanted_gpus = hosts * experts.gpus + routers.replicas * routers.gpus if on_gpu else 0.0
    short = False
    for kind, wanted, found in (("CPUs", wanted_cpus, cpus), ("GPUs", wanted_gpus, gpus)):
        if wanted > found:
            short = True
            # Without a cluster `moray serve` tells its own Ray of as many CPUs as are asked for, and processes share them.
            judge = fail if ray or kind == "GPUs" else warn
            yield judge(
                "deployment",
                f"its processes ask for {wanted:g} {kind}, there are {found:g}",
                f"add nodes, or lower experts.hosts, experts.standby, routers.replicas, or the {kind.lower()} of each",
            )
    if not short:
        asks = f"{wanted_cpus:g} of {cpus:g} CPUs" + (f", {wanted_gpus:g} of {gpus:g} GPUs" if on_gpu else "")
        yield ok("deployment", f"asks for {asks}")


def _labels(deployment: Deployment, ray: Mapping[str, RayNode]) -> Iterator[Finding]:
    if not ray:
        return  # a cluster that is started for a deployment offers what it asks for
    experts, routers, front = deployment.experts, deployment.routers, deployment.front
    wanted: dict[str, float] = {}
    for count, resources in (
        (experts.hosts + experts.standby, experts.resources),
        (experts.cold.hosts, experts.cold.resources),
        (routers.replicas, routers.resources),
        (front.replicas, front.resources),
    ):
        for name, amount in resources.items():
            wanted[name] = wanted.get(name, 0.0) + count * amount
    for name, amount in wanted.items():
        found = sum(node.resources.get(name, 0.0) for node in ray.values())
        if amount > found:
            yield fail(
                "deployment",
                f"its processes ask for {amount:g} of the resource {name!r}, the nodes offer {found:g}",
                f"start Ray with --resources '{{\"{name}\": ...}}' on the nodes meant for them",
            )


def _links(deployment: Deployment, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    without = [node.node for node in nodes if node.torch_gpus and not node.nccl]
    if deployment.link == "nccl" and (without or not any(node.nccl and node.torch_gpus for node in nodes)):
        yield fail(
            "deployment",
            "link = 'nccl': "
            + (f"torch has no NCCL on {', '.join(without)}" if without else "no node has GPUs with NCCL"),
            "use link: auto or gloo, or install torch from PyPI, whose Linux build has NCCL",
        )
    if deployment.link == "shm" and len(nodes) > 1:
        yield warn(
            "deployment",
            "link = 'shm' joins processes of one node, and there are several",
            "use link: auto, which takes shm within a node and nccl or gloo between nodes",
        )


def _front_port(deployment: Deployment, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    for node in nodes:
        for port in node.ports:
            if port.port == deployment.front.port and not port.ours:
                yield replace(
                    fail(
                        "deployment",
                        f"front.port = {port.port} is taken by {port.holder}",
                        "end that process, or choose another front.port (0: any free one)",
                    ),
                    node=node.node,
                )


def _memory(deployment: Deployment, config: ModelConfig, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    from ..planning.plan import make_plan

    try:
        groups = node_groups(nodes, with_gpus=deployment.device != "cpu")
        plan = make_plan(
            deployment.served_name,
            config,
            groups,
            deployment,
            hosts=deployment.experts.hosts,
            context=deployment.max_context or min(config.max_position_embeddings, deployment.routers.cache_tokens),
            cache_tokens=deployment.routers.cache_tokens,
            batches=(1,),
        )
    except MorayError as error:
        yield warn("plan", f"cannot be planned: {error}", "plan by hand: `moray plan MODEL --nodes-file FILE`")
        return
    for problem in plan.problems:
        changes = "; ".join(str(change.what) for change in plan.changes)
        yield fail("plan", problem, changes or "see `moray plan`")
    if plan.fits:
        known = [device for device in plan.layout.devices if device.capacity is not None]
        least = min((device.left for device in known), default=0)
        yield ok("plan", f"the deployment fits; the fullest device has {gib(least)} to spare")


def node_groups(nodes: Sequence[NodeFacts], *, with_gpus: bool) -> tuple[NodeGroup, ...]:
    """The nodes as a plan knows them, each a group of its own.

    Args:
        with_gpus: whether to tell of their GPUs.

    Raises:
        ConfigError: a GPU's kind is not known.
    """
    return tuple(
        NodeGroup(
            name=f"node{index}",
            count=1,
            gpus=facts.torch_gpus if with_gpus else 0,
            gpu=known_kind(facts.gpus[0]) if facts.torch_gpus and with_gpus else None,
            memory_bytes=facts.memory.usable,
            network=facts.network.bits_per_s / 8 or None,
            disk=(facts.model.disk.bytes_per_s or None) if facts.model else None,
        )
        for index, facts in enumerate(nodes)
    )


def known_kind(gpu: GpuFacts) -> GpuKind:
    """The kind of a GPU by the driver's name for it, which says more than a plan's: `NVIDIA H100 80GB HBM3`.

    Raises:
        ConfigError: none of the table's begins alike and has as much memory.
    """
    plain = _plain(gpu.name)
    alike = [
        kind
        for name, kind in GPU_KINDS.items()
        if plain.startswith(_plain(name).removesuffix("80G").removesuffix("40G"))
        and abs(kind.memory_bytes - gpu.memory_total) <= _SAME_SIZE * kind.memory_bytes
    ]
    if alike:
        return max(alike, key=lambda kind: len(kind.name))
    return gpu_kind(gpu.name)


def _plain(name: str) -> str:
    return "".join(c for c in name.upper().replace("NVIDIA", "").replace("GEFORCE", "") if c.isalnum())
