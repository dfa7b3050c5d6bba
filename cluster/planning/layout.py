"""Which process goes onto which device of which node, and what each takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...actors.placement_table import EMPTY, PlacementTable, is_cold
from ...configs.deployment import Deployment
from ...configs.errors import ConfigError
from ..assembly import cold_name, host_compute, host_name, router_name
from ..placement import host_slots, plan_next
from ..replica_counts import Floats
from . import assumptions
from .footprint import KV_PAGES, SERVICES, Device, Process, expert_host, router
from .nodes import GIB, NodeGroup, nodes_of
from .sizes import ModelSizes, model_sizes

_SHARE = 1e-6  # of a GPU: what fractions may be off by


@dataclass(slots=True)
class Layout:
    """Where everything is.

    Attributes:
        devices: all that could hold something, in the order of nodes.
        routers, hosts: process id -> its device.
        table: where every expert goes; None where there is no device for experts at all.
        cold_sizes: of the model where cold hosts compute.
        cache_tokens: KV positions of each router.
        problems: why it does not fit; empty if it does.
        shortages: what of the copies asked for cannot be had, though everything fits: an expert's copies on one node.
    """

    devices: list[Device]
    routers: dict[str, Device]
    hosts: dict[str, Device]
    table: PlacementTable | None
    cold_sizes: ModelSizes
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
    load: Floats | None = None,
) -> Layout:
    """Place the processes: routers one a node in turn, then a host on every GPU that is left (or, without GPUs, on every node).
    The hosts of the cold tier go to the nodes without GPUs.

    Args:
        sizes: of the model.
        groups: the nodes. Where some have GPUs, the others hold what cold hosts do, and no other weights.
        deployment: shares of GPUs, numbers of routers and replicas, the cold tier, pages and budgets.
        hosts: how many expert hosts beside the cold tier; None for as many as there is room for.
        max_context: longest prompt plus answer; a router must have KV pages for one such.
        cache_tokens: KV positions of each router; None for all that its memory leaves.
        table: plan the placement to the last slot; else only how many slots each host has, which is quicker.
        load: [L, E] how much is asked of each expert; None for equally much.

    Raises:
        ConfigError: there are more hosts than experts, or fewer than replicas.
    """
    config, gpus = sizes.config, sum(group.count * group.gpus for group in groups)
    cold_sizes = model_sizes(config, host_compute(deployment, cold_name(0), gpus=gpus))
    devices = _devices(groups, cold=deployment.experts.cold.hosts > 0)
    usual = [device for device in devices if device.node.group.gpus] or devices
    problems: list[str] = []
    routers = _seat_routers(usual, deployment, problems)
    seats = _seats_for_hosts(usual, deployment, hosts, on_gpu=gpus > 0)
    cold_seats = _seats_for_cold_hosts(devices, deployment, problems)
    if hosts is not None and hosts > len(seats):
        problems.append(f"{hosts} expert hosts are asked for, and there is room for {len(seats)}")
    if hosts is None or hosts <= len(seats):
        most = config.n_routed_experts - len(cold_seats)
        seats = seats[: min(len(seats), most) if hosts is None else hosts]
    layout = Layout(devices, routers, {}, None, cold_sizes, 0, problems)
    if not seats:
        problems.append(
            f"no GPU is left for experts: {len(usual)} GPUs, {len(routers)} routers of {deployment.routers.gpus:g} each, "
            f"hosts of {deployment.experts.gpus:g}; give more GPUs, or let processes share one (routers.gpus, experts.gpus)"
        )
        cold_seats = []
    elif len(seats) + len(cold_seats) < deployment.experts.min_replicas:
        problems.append(
            f"{deployment.experts.min_replicas} replicas on distinct hosts are asked for, and there is room for "
            f"{len(seats) + len(cold_seats)} hosts"
        )
        seats, cold_seats = [], []
    layout.hosts = {host_name(index): device for index, device in enumerate(seats)}
    layout.hosts |= {cold_name(index): device for index, device in enumerate(cold_seats)}
    slots = _slots(layout, sizes, deployment, whole_table=table, load=load)
    seated = list(routers.values())
    for name, device in layout.hosts.items():
        device.processes.append(
            expert_host(
                name,
                device,
                cold_sizes if is_cold(name) else sizes,
                deployment,
                slots=slots[name],
                hosts=len(layout.hosts),
                routers=seated,
                frames=sizes.compute.dtype,
            )
        )
    positions = deployment.max_context or min(
        config.max_position_embeddings, cache_tokens or config.max_position_embeddings
    )
    for name, device in routers.items():
        device.processes.append(
            router(name, device, sizes, deployment, positions=positions, hosts=layout.hosts.values())
        )
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
    full = {bool(device.node.group.gpus) for found in alike.values() for device in found}
    known = [(d, d.capacity) for d in devices if d.capacity is not None and bool(d.node.group.gpus) in full]
    used, capacity = sum(device.used for device, _ in known), sum(size for _, size in known)
    margin = sum(device.margin for device, _ in known)
    if lines and used > capacity - margin:
        lines.insert(0, f"all together: {_of(used, capacity, margin)}")
    return lines


def _devices(groups: Sequence[NodeGroup], *, cold: bool) -> list[Device]:
    """Every GPU, and every node without any where there are no GPUs, or `cold` hosts are to be somewhere."""
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
    if with_gpus and not cold:
        return found
    services = {SERVICES: int(assumptions.NODE_SERVICES.value)}
    for node in nodes:
        if node.group.gpus:
            continue
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


def _seats_for_cold_hosts(devices: Sequence[Device], deployment: Deployment, problems: list[str]) -> list[Device]:
    wanted = deployment.experts.cold.hosts
    able = [device for device in devices if not device.node.group.gpus]
    if wanted and not able:
        problems.append(
            f"{wanted} cold hosts are asked for, and every node has GPUs: add some without, as in 2xcpu:512"
        )
        return []
    return [able[index % len(able)] for index in range(wanted)]


def _slots(
    layout: Layout, sizes: ModelSizes, deployment: Deployment, *, whole_table: bool, load: Floats | None
) -> Mapping[str, int]:
    """Experts each host holds, all layers together."""
    config, hosts, section = sizes.config, list(layout.hosts), deployment.experts
    if not hosts:
        return {}
    if not whole_table:
        own = host_slots(config, hosts, section.min_replicas, section.spare_slots, section.cold.slots, {})
        return {host: sum(slots) for host, slots in own.items()}
    placed = plan_next(
        config,
        hosts,
        min_replicas=section.min_replicas,
        spare_slots=section.spare_slots,
        cold_slots=section.cold.slots,
        load=load,
        nodes={name: device.node.name for name, device in layout.hosts.items()},
    )
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
