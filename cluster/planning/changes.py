"""What would make a model fit that does not: single changes, the smallest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...configs.deployment import Deployment
from ...configs.errors import ConfigError
from ...model.compute import Compute
from .gpu_kinds import GPU_KINDS
from .layout import lay_out, node_problems
from .nodes import GIB, NodeGroup
from .sizes import ModelSizes, model_sizes


@dataclass(frozen=True, slots=True)
class Change:
    """One change that alone would make it fit.

    Attributes:
        what: for people.
        extra_bytes: device memory that it adds; 0 for a setting.
    """

    what: str
    extra_bytes: int


def smallest_changes(
    sizes: ModelSizes,
    groups: Sequence[NodeGroup],
    deployment: Deployment,
    *,
    max_context: int,
    cache_tokens: int | None,
) -> list[Change]:
    """Every single change that helps, the one that adds least memory first; settings come before any.

    With as many expert hosts as there is room for, whatever was asked for.
    """

    def fits(
        groups: Sequence[NodeGroup] = groups,
        deployment: Deployment = deployment,
        *,
        sizes: ModelSizes = sizes,
        context: int = max_context,
        cache: int | None = cache_tokens,
    ) -> bool:
        try:
            layout = lay_out(
                sizes, groups, deployment, hosts=None, max_context=context, cache_tokens=cache, table=False
            )
        except ConfigError:
            return False
        return not layout.problems and not node_problems(layout)

    found = [Change(what, 0) for what, changed in _settings(deployment) if fits(deployment=changed)]
    if not sizes.compute.fp8_kv and not sizes.compute.packed:  # CPUs would then compute by torch, in float32
        small = Compute(sizes.compute.device, sizes.compute.dtype, sizes.compute.keep_fp8, fp8_kv=True)
        if fits(sizes=model_sizes(sizes.config, small)):
            found.append(Change("routers.kv_cache: fp8", 0))
    shorter = max_context // 2
    while shorter >= 1024 and not fits(context=shorter, cache=None):
        shorter //= 2
    if shorter >= 1024:
        found.append(Change(f"a max_context of {shorter} instead of {max_context}", 0))
    grown = [*_more_gpus(groups, fits), *_other_gpus(groups, fits), *_more_memory(groups, fits)]
    return found + sorted(grown, key=lambda change: change.extra_bytes)


def _settings(deployment: Deployment) -> Iterator[tuple[str, Deployment]]:
    """Settings that ask for more than the least, each at its least."""
    experts, routers = deployment.experts, deployment.routers
    if experts.spare_slots:
        yield "experts.spare_slots: 0", _with(deployment, "experts", spare_slots=0)
    if experts.min_replicas > 1:
        yield "experts.min_replicas: 1", _with(deployment, "experts", min_replicas=1)
    if experts.cold.hosts and experts.cold.dtype != "bfloat16":
        yield "experts.cold.dtype: bfloat16", _with_cold(deployment, dtype="bfloat16")
    if experts.cold.hosts and experts.cold.fp8 != "keep":
        yield "experts.cold.fp8: keep", _with_cold(deployment, fp8="keep")
    if routers.replicas > 1:
        yield "routers.replicas: 1", _with(deployment, "routers", replicas=1)


def _with(deployment: Deployment, section: str, **changes: Any) -> Deployment:
    changed = getattr(deployment, section).model_copy(update=changes)
    return deployment.model_copy(update={section: changed})


def _with_cold(deployment: Deployment, **changes: Any) -> Deployment:
    return _with(deployment, "experts", cold=deployment.experts.cold.model_copy(update=changes))


def _more_gpus(groups: Sequence[NodeGroup], fits: Callable[..., bool]) -> Iterator[Change]:
    """More GPUs of each kind that is there: on one more node, as many as it takes."""
    for kind in {group.gpu.name: group.gpu for group in groups if group.gpu}.values():
        like = next(group for group in groups if group.gpu == kind)
        there = sum(group.count * group.gpus for group in groups if group.gpu == kind)
        # A part of a node, then whole ones.
        sizes = [(1, part) for part in range(1, like.gpus)]
        sizes += [(nodes, like.gpus) for nodes in range(1, max(8 * there, 64) // like.gpus + 2)]
        grown = [replace(like, name="more", count=nodes, gpus=gpus) for nodes, gpus in sizes]
        if not fits([*groups, grown[-1]]):
            continue  # what is short are not hosts: a router has one GPU, however many there are
        added = next(added for added in grown if fits([*groups, added]))
        count = added.count * added.gpus
        yield Change(f"{count} more {kind.name}: {there + count} in all", count * kind.memory_bytes)


def _other_gpus(groups: Sequence[NodeGroup], fits: Callable[..., bool]) -> Iterator[Change]:
    """As many GPUs, of the smallest kind with more memory that does."""
    with_gpus = [group for group in groups if group.gpu]
    if not with_gpus:
        return
    count = sum(group.count * group.gpus for group in with_gpus)
    before = sum(group.count * group.gpus * group.gpu.memory_bytes for group in with_gpus if group.gpu)
    for kind in sorted(GPU_KINDS.values(), key=lambda kind: kind.memory_bytes):
        if fits([replace(group, gpu=kind) if group.gpu else group for group in groups]):
            yield Change(
                f"{count} {kind.name} in place of the {count} GPUs there are",
                max(0, count * kind.memory_bytes - before),
            )
            return


def _more_memory(groups: Sequence[NodeGroup], fits: Callable[..., bool]) -> Iterator[Change]:
    """Where there is no GPU: more memory in every node, or more nodes."""
    if any(group.gpu for group in groups) or any(group.memory_bytes is None for group in groups):
        return
    nodes = sum(group.count for group in groups)
    like = groups[-1]
    grown = [replace(like, name="more", count=more) for more in range(1, max(8 * nodes, 64) + 1)]
    if fits([*groups, grown[-1]]):
        more = next(added for added in grown if fits([*groups, added])).count
        what = f"{more} more node{'s' if more > 1 else ''} like {like.name}-0: {nodes + more} in all"
        yield Change(what, more * (like.memory_bytes or 0))
    low, high = 0, 1
    while high <= 1 << 16 and not fits(_grown(groups, high)):
        low, high = high, 2 * high
    if high > 1 << 16:
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(_grown(groups, middle)) else (middle, high)
    yield Change(f"{high} GiB more memory in each of the {nodes} nodes", nodes * high * GIB)


def _grown(groups: Sequence[NodeGroup], gib: int) -> list[NodeGroup]:
    return [replace(group, memory_bytes=(group.memory_bytes or 0) + gib * GIB) for group in groups]
