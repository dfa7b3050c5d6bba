"""A plan as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .assumptions import ALL, ROUTING, Assumption
from .footprint import Device
from .layout import node_memory
from .nodes import GIB
from .plan import Plan

_PHASES = ("attention and gate", "dispatch", "experts", "combine", "shared experts", "waiting for hosts")
_CHANGES_SHOWN = 4
_NAMED = 3  # processes of one device


def show(plan: Plan, console: Console) -> None:
    """Print a plan: the verdict first, what it rests on last."""
    _verdict(plan, console)
    _model(plan, console)
    _memory(plan, console)
    if plan.fits:
        _room(plan, console)
        _steps(plan, console)
    _assumed(plan, console)


def _verdict(plan: Plan, console: Console) -> None:
    nodes = ", ".join(str(group) for group in plan.groups)
    console.print(Text(f"{plan.model} on {nodes}: {'fits' if plan.fits else 'does not fit'}", style="bold"))
    for problem in plan.problems:
        console.print(f"  because: {problem}", soft_wrap=True, markup=False)
    if not plan.fits and not plan.changes:
        console.print("  no single change helps: it takes several, or other nodes")
    for index, change in enumerate(plan.changes[:_CHANGES_SHOWN]):
        more = f" ({change.extra_bytes / 1e9:.0f} GB more)" if change.extra_bytes else ""
        console.print(
            f"  {'smallest change' if not index else 'or'}: {change.what}{more}", soft_wrap=True, markup=False
        )


def _model(plan: Plan, console: Console) -> None:
    sizes, moe = plan.sizes, len(plan.config.moe_layers)
    parameters = sizes.parameters
    experts = sizes.expert * (moe * plan.config.n_routed_experts)
    devices = [device for device in plan.layout.devices if device.capacity is not None]
    table = Table.grid(padding=(0, 2))
    what = "drafts tokens" if plan.config.draft_layers else "is not loaded"
    mtp = f"; {_count(parameters.mtp)} more in its MTP module, which {what}" if parameters.mtp else ""
    table.add_row("parameters", f"{_count(parameters.main)}, {_count(parameters.active)} active a token{mtp}")
    table.add_row("on disk", f"{_size(sizes.disk_total.total)}, {_size(sizes.disk_total.scales)} of it scales")
    table.add_row(
        "in memory",
        f"experts {_size(experts.total)} for one copy ({_size(sizes.expert.total)} each), each router "
        f"{_size(sizes.router.total.total)}, and {sizes.kv_token_bytes} bytes of KV a token",
    )
    if devices:
        capacity, margin = sum(d.capacity or 0 for d in devices), sum(d.margin for d in devices)
        table.add_row(
            "there is",
            f"{_size(capacity)} on {len(devices)} device{'s' if len(devices) > 1 else ''}, "
            f"{_size(capacity - margin)} of it usable",
        )
    console.print(table)


def _memory(plan: Plan, console: Console) -> None:
    table = Table(title="memory", title_justify="left")
    parts = _parts(plan.layout.devices)
    for name in ("devices", "each holds", *parts, "used", "of"):
        table.add_column(name, justify="left" if name in ("devices", "each holds") else "right")
    for devices in alike(plan.layout.devices):
        fullest = max(devices, key=lambda device: device.used)
        name = fullest.name if len(devices) == 1 else f"{len(devices)} x {_what(fullest)}, the fullest:"
        sums = _sums(fullest)
        cells = [_size(sums[part]) if part in sums else "" for part in parts]
        capacity = "?" if fullest.capacity is None else _size(fullest.capacity)
        table.add_row(name, _held(fullest), *cells, _size(fullest.used), capacity)
    console.print(table)
    for line in _node_lines(plan):
        console.print(line, soft_wrap=True, markup=False)


def _held(device: Device) -> str:
    names = [f"{p.id} ({p.slots} experts)" if p.slots else p.id for p in device.processes]
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(names[:_NAMED] + more) or "nothing"


def _node_lines(plan: Plan) -> Iterable[str]:
    """One line for all nodes that need the same of their own memory."""
    groups = {device.node.name: device.node.group for device in plan.layout.devices}
    alike: dict[int, list[str]] = {}
    for node, parts in node_memory(plan.layout).items():
        alike.setdefault(sum(parts.values()), []).append(node)
    for used, nodes in alike.items():
        memory = groups[nodes[0]].memory_bytes
        of = f" of {memory / GIB:.0f} GiB" if memory is not None else ", of how much is not known"
        console_name = nodes[0] if len(nodes) == 1 else f"{nodes[0]} to {nodes[-1]} ({len(nodes)} nodes)"
        yield f"own memory of {console_name}: {used / GIB:.1f} GiB while loading{of}"


def _room(plan: Plan, console: Console) -> None:
    placement, layout, deployment = plan.placement, plan.layout, plan.deployment
    assert placement is not None
    table = Table.grid(padding=(0, 2))
    routers = len(layout.routers)
    table.add_row(
        "context",
        f"{layout.cache_tokens} tokens in the KV pages of each router (routers.cache_tokens): {plan.requests_at_once} requests "
        f"of {plan.context} tokens at once, over {routers} router{'s' if routers > 1 else ''}",
    )
    running = routers * deployment.routers.max_running
    if plan.requests_at_once > running:
        table.add_row("", f"of which routers.max_running = {deployment.routers.max_running} lets {running} run")
    low, high = placement.slots_per_layer
    copies = placement.replicas
    table.add_row(
        "experts",
        f"{placement.hosts} hosts with {_range(low, high)} slots a layer, {_range(*copies)} "
        f"cop{'y' if copies == (1, 1) else 'ies'} of each expert on {_range(*placement.nodes_per_expert)} node(s)",
    )
    if placement.cold_hosts:
        popular = f"popular as n ** -{plan.skew:g}" if plan.skew else "equally popular, the worst case: see --skew"
        table.add_row(
            "cold tier",
            f"{placement.cold_hosts} hosts with {placement.cold_slots} slots a layer, for {placement.cold_share:.1%} of what "
            f"experts are asked for, with experts {popular}",
        )
    for host, held in placement.examples.items():
        shown = ", ".join(str(expert) for expert in held[:12]) + (", ..." if len(held) > 12 else "")
        table.add_row("", f"{host}, layer {plan.config.first_k_dense_replace}: {shown}")
    table.add_row("", "every slot: --json")
    if layout.shortages:
        more = f" (and {len(layout.shortages) - 1} more like it: --json)" if len(layout.shortages) > 1 else ""
        table.add_row("short", layout.shortages[0] + more)
    table.add_row("load", f"{plan.load_s:.0f} s from nothing to ready, each node reading its own part")
    if deployment.experts.min_replicas == 1:
        table.add_row("", "one copy of each expert: the loss of a host is a pause until another has loaded them")
    console.print(table)


def _steps(plan: Plan, console: Console) -> None:
    phases = [phase for phase in _PHASES if any(step.phases.get(phase, 0.0) > 0 for step in plan.steps)]
    table = Table(title=f"one decode step, each request with {plan.context} tokens in the cache", title_justify="left")
    for name in ("requests", "ms", "tokens/s each", "in all"):
        table.add_column(name, justify="right")
    if plan.price_per_hour is not None:
        table.add_column("price of a million", justify="right")
    for name in (*phases, "other", "router reads", "a host reads", "a layer sends"):
        table.add_column(name, justify="right")
    table.add_column("limited by most")
    for step in plan.steps:
        other = step.seconds - sum(step.phases.get(phase, 0.0) for phase in phases)
        table.add_row(
            f"{step.batch}{'*' if step.notes else ''}",
            f"{step.seconds * 1e3:.1f}",
            f"{step.tokens_per_user:.1f}",
            f"{step.tokens_in_all:.0f}",
            *([] if step.cost_per_million is None else [f"{step.cost_per_million:.2f}"]),
            *(f"{step.phases.get(phase, 0.0) * 1e3:.1f}" for phase in phases),
            f"{other * 1e3:.1f}",
            _size(step.router_read),
            _size(step.host_read),
            _size(step.traffic.sent + step.traffic.received),
            step.limit,
        )
    console.print(table)
    for step in plan.steps:
        if step.notes:
            console.print(f"* {step.batch} requests: {', '.join(step.notes)}", soft_wrap=True, markup=False)


def _assumed(plan: Plan, console: Console) -> None:
    table = Table(title="taken for granted", title_justify="left")
    for name in ("what", "value", "source"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for entry in ALL:
        if entry is ROUTING:
            by_rank = (
                f"the n-th expert of a layer in proportion to n ** -{plan.skew:g}, which the placement was made for"
            )
            table.add_row(entry.name, "", by_rank if plan.skew else entry.source)
        else:
            table.add_row(entry.name, _value(entry), entry.source)
    console.print(table)


def _value(entry: Assumption) -> str:
    if entry.unit.startswith("bytes"):
        return _size(entry.value) + entry.unit.removeprefix("bytes")
    if entry.unit == "s" and entry.value < 1e-3:
        return f"{entry.value * 1e6:.0f} us"
    return f"{entry.value:.3g} {entry.unit}".strip()


def alike(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices that differ in name alone together, in the order of the first of each."""
    found: dict[object, list[Device]] = {}
    for device in devices:
        roles = tuple(process.role for process in device.processes)
        found.setdefault((_what(device), device.capacity, roles), []).append(device)
    return list(found.values())


def _what(device: Device) -> str:
    return device.node.group.gpu.name if device.node.group.gpu else "node"


def _parts(devices: Sequence[Device]) -> list[str]:
    return list(dict.fromkeys(part for device in devices for part in _sums(device)))


def _sums(device: Device) -> dict[str, int]:
    sums = dict(device.fixed)
    for process in device.processes:
        for part, count in process.memory.items():
            sums[part] = sums.get(part, 0) + count
    return sums


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}" if count < 1000 * unit else f"{count / unit:.0f} {name}"
    return f"{count:.0f} B"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
