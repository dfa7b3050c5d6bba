"""Plans placements: measured load, hosts and the table of now in; the next table and the way there out. Pure functions.

The shape of the problem (replicate hot experts, then pack) and the yardstick are those of DeepSeek's expert-parallel load
balancer. Here hosts may differ in slots and speed, some may be dead, replicas of one expert are always on distinct hosts,
and a plan starts from the current table: a layer is touched only where that is needed or wins `min_gain`, and then by as few
loaded slots as a steepest descent needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ..actors.placement_table import EMPTY, PlacementTable
from ..configs.errors import ConfigError
from .cold_tier import plan_tiers
from .layer_packing import Bools
from .layer_plan import MIN_GAIN as MIN_GAIN
from .layer_plan import LayerPlan, plan_layer
from .replica_counts import Floats, Ints, slots_short


class NotEnoughSlotsError(ConfigError):
    """The hosts that are alive cannot hold every expert once.

    Attributes:
        missing: slots that are missing, all layers together.
        per_layer: slots that are missing in the layer that lacks most.
    """

    def __init__(self, message: str, *, missing: int, per_layer: int) -> None:
        super().__init__(message)
        self.missing = missing
        self.per_layer = per_layer


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a plan must know about one expert host.

    Attributes:
        host: its id.
        slots: experts it can hold in each layer: one number for all layers, or one for each. 0 for a host that is to be
            emptied: it holds nothing afterwards, but what it holds now can be copied from it.
        speed: how fast it computes compared with the others.
        node: the machine it is on; hosts with "" are each on a machine of their own.
        alive: dead hosts get nothing, and nothing can be copied from them.
        cold: it is for the experts that least is asked of (`cold_tier.py`); its speed counts beside that of its like alone.
    """

    host: str
    slots: int | tuple[int, ...]
    speed: float = 1.0
    node: str = ""
    alive: bool = True
    cold: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """One slot to fill: (layer, expert) into `slot` of `host`.

    Attributes:
        layer: the model's layer.
        expert: the logical expert.
        sources: hosts that hold it now and are alive, those on the same node first; none: only the disk has it.
        host: where it goes.
        slot: the slot there, whose old content, if any, is not needed in the new table.
    """

    layer: int
    expert: int
    sources: tuple[str, ...]
    host: str
    slot: int


class Lack(StrEnum):
    """Why an expert has fewer replicas, or these on fewer nodes, than was asked for."""

    HOSTS = "hosts"
    SLOTS = "slots"
    NODES = "nodes"


@dataclass(frozen=True, slots=True)
class Shortage:
    """What could not be given to one expert of one layer.

    Attributes:
        layer: the model's layer.
        expert: the logical expert.
        lack: what there is too little of. With NODES the replicas are there, but on fewer nodes than would be possible.
        wanted: replicas (NODES: distinct nodes) asked for.
        granted: replicas (NODES: distinct nodes) in the plan.
    """

    layer: int
    expert: int
    lack: Lack
    wanted: int
    granted: int

    def __str__(self) -> str:
        short = f"expert {self.expert} of layer {self.layer}"
        if self.lack is Lack.NODES:
            return f"{short}: its replicas are on {self.granted} nodes, not on {self.wanted}"
        why = "too few hosts are alive" if self.lack is Lack.HOSTS else "the hosts have too few slots"
        return f"{short} has {self.granted} of {self.wanted} replicas: {why}"


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """The next placement and the way there.

    Attributes:
        table: the new table, one epoch after the current one; has the hosts that are alive.
        moves: the slots to fill before it can be served, by layer, host and slot.
        changed: the table differs from the current one: it must be published even where nothing moves.
        host_load: host -> for each layer the load expected on it, in the unit of the measured load, with tokens shared out
            between replicas step by step.
        balancedness: for each layer mean over maximum of the hosts' load over speed, the mean weighted by speed: what to
            expect with tokens shared out. Of the hosts that are not cold, where there are such; so are the next two.
        balancedness_before: the same of the current table without its dead hosts; 0 where an expert is nowhere.
        balancedness_equal: the same if every expert's load were split equally between its replicas, which is what others
            publish. Never much above `balancedness`; far below it where replicas are spares.
        shortages: what was asked for and could not be given.
    """

    table: PlacementTable
    moves: tuple[Move, ...]
    changed: bool
    host_load: Mapping[str, tuple[float, ...]]
    balancedness: tuple[float, ...]
    balancedness_before: tuple[float, ...]
    balancedness_equal: tuple[float, ...]
    shortages: tuple[Shortage, ...] = field(default=())


def plan_placement(
    load: npt.ArrayLike,
    hosts: Sequence[HostSpec],
    *,
    first_layer: int,
    current: PlacementTable | None = None,
    min_replicas: int = 1,
    replicas: Mapping[tuple[int, int], int] | None = None,
    groups: int = 1,
    min_gain: float = MIN_GAIN,
) -> PlacementPlan:
    """Plan the next placement.

    Every expert gets `min_replicas` replicas on distinct hosts, on distinct nodes as far as there are any; all other slots
    are filled with replicas that relieve the busiest. Where a layer is laid out anew, the experts of a group are brought to
    one node as far as that makes no host busier.

    Args:
        load: [L, E] measured load of each expert, in any unit, for each layer with routed experts. A layer without any load
            is planned for equal loads.
        hosts: in an order that does not change from plan to plan.
        first_layer: the model's layer that `load[0]` belongs to.
        current: the table of now; its experts stay where they are as far as possible.
        min_replicas: replicas each expert should have.
        replicas: (model layer, expert) -> replicas that this one should have at least.
        groups: the gate's expert groups: equal runs of neighbouring experts.
        min_gain: a layer that can win less balancedness than this is not touched without need.

    Raises:
        NotEnoughSlotsError: not every expert finds a slot on a host that is alive; says how many slots are missing.
        ConfigError: a host, `min_replicas` or an entry of `replicas` cannot be.
    """
    loads = np.asarray(load, dtype=np.float64)
    assert loads.ndim == 2, loads.shape
    assert bool(np.isfinite(loads).all()), "loads must be finite"
    assert bool((loads >= 0).all()), "loads must not be negative"
    layers, experts = loads.shape
    assert current is None or (current.experts, current.first_layer) == (experts, first_layer)
    site = _Site.of(hosts, layers)
    required = _required(min_replicas, replicas or {}, first_layer, layers, experts)
    _check_slots(site, experts, first_layer)
    group = np.arange(experts) * groups // experts if groups > 1 else None

    def planned_layer(index: int) -> LayerPlan:
        own = (loads[index], site.slots[index], site.speed, site.node)
        now = None if current is None else _held_now(current, site, index)
        if (site.cold & (site.slots[index] > 0)).any():
            return plan_tiers(*own, site.cold, required=required[index], now=now, group=group, min_gain=min_gain)
        return plan_layer(*own, required=required[index], now=now, group=group, min_gain=min_gain)

    planned = [planned_layer(index) for index in range(layers)]
    slots, moves = _slots_and_moves(planned, site, first_layer, current)
    table = PlacementTable(1 if current is None else current.epoch + 1, first_layer, experts, slots)
    shortages = [
        Shortage(first_layer + index, expert, lack, wanted, granted)
        for index, layer in enumerate(planned)
        for expert, lack, wanted, granted in _shortages(layer, required[index], site, index)
    ]
    return PlacementPlan(
        table=table,
        moves=tuple(moves),
        changed=current is None or dict(current.slots) != slots,
        host_load={
            spec.host: tuple(float(layer.host_load[h]) for layer in planned) for h, spec in enumerate(site.hosts)
        },
        balancedness=tuple(layer.balancedness for layer in planned),
        balancedness_before=tuple(layer.before for layer in planned),
        balancedness_equal=tuple(layer.equal for layer in planned),
        shortages=tuple(shortages),
    )


@dataclass(frozen=True, slots=True)
class _Site:
    """The hosts that are alive, as arrays: slots [L, H], speed [H], node [H] (an index), cold [H]."""

    hosts: tuple[HostSpec, ...]
    slots: Ints
    speed: Floats
    node: Ints
    cold: Bools

    @classmethod
    def of(cls, specs: Sequence[HostSpec], layers: int) -> _Site:
        names = [spec.host for spec in specs]
        assert len(set(names)) == len(names), f"two hosts of one name among {names}"
        for spec in specs:
            own = spec.slots if isinstance(spec.slots, tuple) else (spec.slots,) * layers
            if len(own) != layers or min(own, default=0) < 0:
                raise ConfigError(f"{spec.host}: slots = {spec.slots}: needs {layers} numbers of at least 0")
            if not (spec.speed > 0 and np.isfinite(spec.speed)):
                raise ConfigError(f"{spec.host}: speed = {spec.speed}: must be above 0")
        alive = tuple(spec for spec in specs if spec.alive)
        slots = np.zeros((layers, len(alive)), dtype=np.int64)
        for h, spec in enumerate(alive):
            slots[:, h] = spec.slots
        nodes: dict[tuple[str, str], int] = {}
        for spec in alive:
            nodes.setdefault((spec.node, "" if spec.node else spec.host), len(nodes))
        node = [nodes[spec.node, "" if spec.node else spec.host] for spec in alive]
        speed = np.asarray([spec.speed for spec in alive], dtype=np.float64)
        cold = np.asarray([spec.cold for spec in alive], dtype=np.bool_)
        return cls(alive, slots, speed, np.asarray(node, dtype=np.int64), cold)


def _required(
    min_replicas: int, replicas: Mapping[tuple[int, int], int], first_layer: int, layers: int, experts: int
) -> Ints:
    """[L, E] replicas that were asked for."""
    if min_replicas < 1:
        raise ConfigError(f"min_replicas = {min_replicas}: must be at least 1")
    required = np.full((layers, experts), min_replicas, dtype=np.int64)
    for (layer, expert), count in replicas.items():
        if not (first_layer <= layer < first_layer + layers and 0 <= expert < experts):
            raise ConfigError(
                f"replicas {layer}:{expert}={count}: layers with experts are {first_layer} to "
                f"{first_layer + layers - 1}, experts 0 to {experts - 1}"
            )
        if count < 1:
            raise ConfigError(f"replicas {layer}:{expert}={count}: must be at least 1")
        required[layer - first_layer, expert] = max(min_replicas, count)
    return required


def _check_slots(site: _Site, experts: int, first_layer: int) -> None:
    short = [slots_short(slots, experts) for slots in site.slots]
    missing = sum(short)
    if missing:
        worst = int(np.argmax(short))
        raise NotEnoughSlotsError(
            f"layer {first_layer + worst} has {experts} experts and the {len(site.hosts)} hosts that are alive have "
            f"{experts - short[worst]} slots for it: {short[worst]} are missing ({missing} in all layers together); "
            "add hosts or give them more slots",
            missing=missing,
            per_layer=short[worst],
        )


def _held_now(current: PlacementTable, site: _Site, index: int) -> Bools:
    """[H, E] what the hosts hold now and can go on holding."""
    held = np.zeros((len(site.hosts), current.experts), dtype=np.bool_)
    for h, spec in enumerate(site.hosts):
        if spec.host in current.slots:
            own = dict.fromkeys(expert for expert in current.slots[spec.host][index] if expert != EMPTY)
            held[h, list(own)[: int(site.slots[index, h])]] = True
    return held


def _shortages(layer: LayerPlan, required: Ints, site: _Site, index: int) -> list[tuple[int, Lack, int, int]]:
    """(expert, lack, wanted, granted) of everything the layer does not give."""
    alive = int((site.slots[index] > 0).sum())
    found = []
    for expert in np.flatnonzero((layer.granted < required) | (layer.covered < layer.spread)).tolist():
        wanted, granted = int(required[expert]), int(layer.granted[expert])
        if granted < wanted:
            found.append((expert, Lack.HOSTS if granted == alive else Lack.SLOTS, wanted, granted))
        if layer.covered[expert] < layer.spread[expert]:
            found.append((expert, Lack.NODES, int(layer.spread[expert]), int(layer.covered[expert])))
    return found


def _slots_and_moves(
    planned: Sequence[LayerPlan], site: _Site, first_layer: int, current: PlacementTable | None
) -> tuple[dict[str, tuple[tuple[int, ...], ...]], list[Move]]:
    """Experts into slots: what stays keeps its slot, what is new takes the slots that are free."""
    rows: dict[str, list[tuple[int, ...]]] = {spec.host: [] for spec in site.hosts}
    moves: list[Move] = []
    for index, layer in enumerate(planned):
        holders: dict[int, list[int]] = {}
        for h, spec in enumerate(site.hosts):
            if current is not None and spec.host in current.slots:
                for expert in dict.fromkeys(current.slots[spec.host][index]):
                    holders.setdefault(expert, []).append(h)
        for h, spec in enumerate(site.hosts):
            row = [EMPTY] * int(site.slots[index, h])
            wanted = set(np.flatnonzero(layer.held[h]).tolist())
            old = current.slots.get(spec.host) if current is not None else None
            for slot, expert in enumerate(old[index][: len(row)] if old else ()):
                if expert in wanted:
                    row[slot] = expert
                    wanted.remove(expert)
            free = (slot for slot, expert in enumerate(row) if expert == EMPTY)
            for expert, slot in zip(sorted(wanted), free, strict=False):
                row[slot] = expert
                near = sorted(holders.get(expert, ()), key=lambda other: site.node[other] != site.node[h])
                sources = tuple(site.hosts[other].host for other in near)
                moves.append(Move(first_layer + index, expert, sources, spec.host, slot))
            rows[spec.host].append(tuple(row))
    return {host: tuple(layers) for host, layers in rows.items()}, moves
