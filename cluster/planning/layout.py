"""Which process goes onto which device of which node, and what each takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...actors.placement_table import EMPTY, PlacementTable
from ...configs.deployment import Deployment
from ...configs.errors import ConfigError
from ...model.config import ModelConfig
from ..assembly import host_name, router_name
from ..placement import plan_next
from . import assumptions
from .footprint import KV_PAGES, SERVICES, Device, Process, expert_host, router
from .nodes import GIB, NodeGroup, nodes_of
from .sizes import ModelSizes

_SHARE = 1e-6  # of a GPU: what fractions may be off by


@dataclass(slots=True)
class Layout:
    """Where everything is.

    Attributes:
        devices: all that could hold something, in the order of nodes.
        routers, hosts: process id -> its device.
        table: where every expert goes; None where there is no device for experts at all.
        cache_tokens: KV positions of each router.
        problems: why it does not fit; empty if it does.
        shortages: what of the copies asked for cannot be had, though everything fits: an expert's copies on one node.
    """

    devices: list[Device]
    routers: dict[str, Device]
    hosts: dict[str, Device]
    table: PlacementTable | None
    cache_tokens: int
    problems: list[str]
    shortages: tuple[str, ...] = ()

    def process(self, name: str) -> Process:
        """A process by its id."""
        device = self.routers.get(name) or self.hosts[name]
        return next(process for process in device.processes if process.id == name)


def lay_out(
    sizes: ModelSizes,
    groups: Sequence[NodeGroup],
    deployment: Deployment,
    *,
    hosts: int | None,
    max_context: int,
    cache_tokens: int | None,
    table: bool = True,
) -> Layout:
    """Place the processes: routers one a node in turn, then a host on every GPU that is left (or, without GPUs, on every node).

    Args:
        sizes: of the model.
        groups: the nodes. Where some have GPUs, the others hold no weights.
        deployment: shares of GPUs, numbers of routers and replicas, pages and budgets.
        hosts: how many expert hosts; None for as many as there is room for.
        max_context: longest prompt plus answer; a router must have KV pages for one such.
        cache_tokens: KV positions of each router; None for all that its memory leaves.
        table: plan the placement to the last slot; else only how many slots each host has, which is quicker.

    Raises:
        ConfigError: there are more hosts than experts, or fewer than replicas.
    """
    config = sizes.config
    devices = _devices(groups)
    on_gpu = any(group.gpus for group in groups)
    problems: list[str] = []
    routers = _seat_routers(devices, deployment, problems)
    seats = _seats_for_hosts(devices, deployment, hosts, on_gpu=on_gpu)
    if hosts is not None and hosts > len(seats):
        problems.append(f"{hosts} expert hosts are asked for, and there is room for {len(seats)}")
    if hosts is None or hosts <= len(seats):
        seats = seats[: min(len(seats) if hosts is None else hosts, config.n_routed_experts)]
    layout = Layout(devices, routers, {}, None, 0, problems)
    if not seats:
        problems.append(
            f"no GPU is left for experts: {len(devices)} GPUs, {len(routers)} routers of {deployment.routers.gpus:g} each, "
            f"hosts of {deployment.experts.gpus:g}; give more GPUs, or let processes share one (routers.gpus, experts.gpus)"
        )
    elif len(seats) < deployment.experts.min_replicas:
        problems.append(
            f"{deployment.experts.min_replicas} replicas on distinct hosts are asked for, and there is room for "
            f"{len(seats)} hosts"
        )
        seats = []
    layout.hosts = {host_name(index): device for index, device in enumerate(seats)}
    slots = _slots(layout, config, deployment, whole_table=table)
    seated = list(routers.values())
    for name, device in layout.hosts.items():
        device.processes.append(
            expert_host(name, device, sizes, deployment, slots=slots[name], hosts=len(seats), routers=seated)
        )
    positions = deployment.max_context or min(
        config.max_position_embeddings, cache_tokens or config.max_position_embeddings
    )
    for name, device in routers.items():
        device.processes.append(router(name, device, sizes, deployment, positions=positions, hosts=seats))
    problems += _overfull(devices)
    _add_pages(layout, sizes, deployment, max_context=max_context, cache_tokens=cache_tokens)
    return layout


def _of(used: int, capacity: int, margin: int) -> str:
    return f"{used / 1e9:.1f} GB needed, {(capacity - margin) / 1e9:.1f} GB usable of {capacity / 1e9:.1f} GB"


def _overfull(devices: Sequence[Device]) -> list[str]:
    """One line for all devices of one size that hold too much of the same."""
    alike: dict[tuple[int | None, str], list[Device]] = {}
    for device in devices:
        if device.left < 0:
            roles = " and ".join(
                sorted({f"an {p.role}" if p.role[0] == "e" else f"a {p.role}" for p in device.processes})
            ).replace("_", " ")
            alike.setdefault((device.capacity, roles), []).append(device)
    lines = []
    for (capacity, roles), found in alike.items():
        worst = min(found, key=lambda device: device.left)
        assert capacity is not None
        who = f"{len(found)} devices with {roles} each" if len(found) > 1 else f"{worst.name} with {roles}"
        lines.append(f"{who}: up to {_of(worst.used, capacity, worst.margin)}")
    known = [(device, device.capacity) for device in devices if device.capacity is not None]
    used, capacity = sum(device.used for device, _ in known), sum(size for _, size in known)
    margin = sum(device.margin for device, _ in known)
    if lines and used > capacity - margin:
        lines.insert(0, f"all together: {_of(used, capacity, margin)}")
    return lines


def _devices(groups: Sequence[NodeGroup]) -> list[Device]:
    margin = assumptions.MEMORY_MARGIN.value
    nodes = nodes_of(groups)
    with_gpus = [node for node in nodes if node.group.gpus]
    found = []
    for node in with_gpus:
        gpu = node.group.gpu
        assert gpu is not None
        for index in range(node.group.gpus):
            capacity = gpu.memory_bytes
            found.append(Device(f"{node.name} {gpu.name} {index}", node, index, capacity, int(capacity * margin)))
    if with_gpus:
        return found
    services = {SERVICES: int(assumptions.NODE_SERVICES.value)}
    for node in nodes:
        memory = node.group.memory_bytes
        found.append(Device(node.name, node, 0, memory, int((memory or 0) * margin), fixed=dict(services)))
    return found


def _seat_routers(devices: Sequence[Device], deployment: Deployment, problems: list[str]) -> dict[str, Device]:
    """Routers go to as many nodes as there are, so that they share no network card."""
    share = deployment.routers.gpus if devices[0].node.group.gpus else 0.0
    by_node: dict[str, list[Device]] = {}
    for device in devices:
        by_node.setdefault(device.node.name, []).append(device)
    nodes = list(by_node.values())
    found = {}
    for index in range(deployment.routers.replicas):
        turns = [nodes[(index + turn) % len(nodes)] for turn in range(len(nodes))]
        seat = next((d for node in turns for d in node if d.free >= share - _SHARE), None)
        if seat is None:
            problems.append(
                f"{deployment.routers.replicas} routers of {share:g} GPUs each are asked for, and {len(devices)} GPUs hold "
                f"{index} of them"
            )
            break
        seat.free -= share
        found[router_name(index)] = seat
    return found


def _seats_for_hosts(
    devices: Sequence[Device], deployment: Deployment, hosts: int | None, *, on_gpu: bool
) -> list[Device]:
    if not on_gpu:
        # Ray counts CPUs there, of which a plan knows nothing: several hosts may share a node, in turn.
        wanted = max(len(devices), deployment.experts.hosts) if hosts is None else hosts
        return [devices[index % len(devices)] for index in range(wanted)]
    share = deployment.experts.gpus
    if share > 1:
        raise ConfigError(f"experts.gpus = {share:g}: a host computes on one GPU; use 1 or a fraction")
    return [device for device in devices for _ in range(int((device.free + _SHARE) / share))]


def _slots(layout: Layout, config: ModelConfig, deployment: Deployment, *, whole_table: bool) -> Mapping[str, int]:
    """Experts each host holds, all layers together."""
    hosts, section = list(layout.hosts), deployment.experts
    if not hosts:
        return {}
    if not whole_table:
        # As `plan_next` shares them out: in each layer those that are next in turn have one more.
        share, larger = divmod(config.n_routed_experts * section.min_replicas, len(hosts))
        host, layer = np.ogrid[: len(hosts), : len(config.moe_layers)]
        held = share + ((host + layer * larger) % len(hosts) < larger) + section.spare_slots
        totals = np.minimum(held, config.n_routed_experts).sum(axis=1)
        return dict(zip(hosts, totals.tolist(), strict=True))
    nodes = {name: device.node.name for name, device in layout.hosts.items()}
    placed = plan_next(config, hosts, min_replicas=section.min_replicas, spare_slots=section.spare_slots, nodes=nodes)
    layout.table, layout.shortages = placed.table, tuple(map(str, placed.shortages))
    return {
        host: sum(expert != EMPTY for layer in held for expert in layer) for host, held in layout.table.slots.items()
    }


def _add_pages(
    layout: Layout, sizes: ModelSizes, deployment: Deployment, *, max_context: int, cache_tokens: int | None
) -> None:
    """Give every router the same number of KV pages."""
    page = deployment.routers.page_size
    page_bytes = page * sizes.kv_token_bytes
    if not layout.routers:
        return
    if cache_tokens is not None:
        pages = -(-cache_tokens // page)
    else:
        sharing: dict[int, int] = {}
        for device in layout.routers.values():
            sharing[id(device)] = sharing.get(id(device), 0) + 1
        pages = min(max(0, d.left) // page_bytes // sharing[id(d)] for d in layout.routers.values())
    before = {id(device): device.left for device in layout.routers.values()}
    for name in layout.routers:
        layout.process(name).memory[KV_PAGES] = pages * page_bytes
    layout.cache_tokens = pages * page
    for device in {id(d): d for d in layout.routers.values()}.values():
        if device.left < 0 <= before[id(device)]:
            layout.problems.append(
                f"{device.name}: {pages * page_bytes / 1e9:.1f} GB of KV pages for {pages * page} tokens are asked for, and "
                f"{before[id(device)] / 1e9:.1f} GB are left"
            )
    if layout.cache_tokens < max_context and not any(device.left < 0 for device in layout.routers.values()):
        layout.problems.append(
            f"a router has room for {layout.cache_tokens} tokens of KV, and one request may have {max_context}: "
            f"{max_context * sizes.kv_token_bytes / 1e9:.1f} GB"
        )


def node_memory(layout: Layout) -> dict[str, dict[str, int]]:
    """Node -> bytes of its own memory by what they are for; of nodes with GPUs alone, on which weights are elsewhere."""
    found: dict[str, dict[str, int]] = {}
    for device in layout.devices:
        if not device.node.group.gpus:
            continue
        mine = found.setdefault(device.node.name, {SERVICES: int(assumptions.NODE_SERVICES.value)})
        for process in device.processes:
            for what, count in process.node_memory.items():
                mine[what] = mine.get(what, 0) + count
    return found


def node_problems(layout: Layout) -> list[str]:
    """Nodes with GPUs whose own memory is too small, as far as it is known."""
    problems = []
    groups = {device.node.name: device.node.group for device in layout.devices}
    for node, parts in node_memory(layout).items():
        memory, used = groups[node].memory_bytes, sum(parts.values())
        if memory is not None and used > memory:
            problems.append(
                f"{node}: its processes need {used / GIB:.1f} GiB of its own memory, which has {memory / GIB:.1f}"
            )
    return problems
