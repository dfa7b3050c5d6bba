"""The plan of a layer whose hosts are of two kinds: the cold tier gets what least is asked of. Pure functions of arrays.

Cold hosts are tens of times slower than the others, and exist for their memory. So their times are not balanced against the
others': a layer's experts are split between the two kinds first, such that the cold tier has the least load that so many
slots can have; then the hosts of each kind are planned by themselves, as in `layer_plan.py`.
"""

from __future__ import annotations

import numpy as np

from ..actors.placement_table import EMPTY, PlacementTable, is_cold
from .layer_packing import Bools, balancedness
from .layer_plan import LayerPlan, plan_layer
from .replica_counts import Floats, Ints
from .shared_load import shared_load

_TOLERATED = 0.15
"""The cold tier's load may be so much more than the least possible before experts change places for it.

The 16 least of 256 equal experts seem to have 10% less than others where 5% noise is in the load: that must move nothing."""

_NEGLIGIBLE = 0.001
"""Share of a layer's load for which nothing moves either: two (token, expert) pairs of a step of 256 tokens with 8 each."""


def coldest(load: Floats, number: int, now: Bools, *, keep: bool) -> Bools:
    """[E] the `number` experts with the least load, as far as that is worth leaving those that are chosen `now` [E].

    Experts change places in order of what that wins, until half of what is tolerated is left, so that the next measurement,
    with other noise, asks for none. Among equals, experts are chosen at even distances: neighbours form a group.

    Args:
        load: [E] load of each expert.
        number: how many, at most E.
        now: [E] those that are chosen already.
        keep: leave them whatever would be won; only missing ones are added, and the busiest dropped if there are too many.
    """
    order = np.lexsort((np.arange(len(load)) * number % len(load), load))
    chosen = np.zeros(len(load), dtype=np.bool_)
    chosen[order[now[order]][:number]] = True
    chosen[order[~now[order]][: number - int(chosen.sum())]] = True
    least = float(load[order[:number]].sum())
    tolerated = max(_TOLERATED * least, _NEGLIGIBLE * float(load.sum()))
    excess = float(load[chosen].sum()) - least
    if keep or excess <= tolerated:
        return chosen
    heavy, light = order[chosen[order]][::-1], order[~chosen[order]]
    for out, into in zip(heavy.tolist(), light.tolist(), strict=False):
        if excess <= tolerated / 2 or load[out] <= load[into]:
            break
        chosen[out], chosen[into] = False, True
        excess -= float(load[out] - load[into])
    return chosen


def plan_tiers(
    load: Floats,
    slots: Ints,
    speed: Floats,
    node: Ints,
    cold: Bools,
    *,
    required: Ints,
    now: Bools | None = None,
    group: Ints | None = None,
    min_gain: float,
) -> LayerPlan:
    """`plan_layer` for hosts some of which are `cold` [H].

    The cold tier's slots take a copy each of the experts with the least load. The other hosts hold every other expert, and
    what is required beyond one copy. Load, balancedness and the like of the result are those of the other hosts: work for an
    expert that both have is theirs.
    """
    weight = load if load.any() else np.ones_like(load)
    held = np.zeros((len(slots), len(load)), dtype=np.bool_) if now is None else now
    copies = _cold_copies(weight, slots[cold], held[cold], keep=min_gain >= 1)
    hot = _needed_elsewhere(weight, copies, required, room=int(np.minimum(slots[~cold], len(load)).sum()))
    plan = _Merged(load, slots, speed, cold, held)
    for hosts, experts, wanted in (
        (~cold, hot, np.maximum(1, required - copies)),
        (cold, copies > 0, copies),
    ):
        if experts.any():
            within = np.ix_(hosts, experts)
            part = plan_layer(
                # What the other hosts compute costs the cold ones nothing.
                (np.where(hot, 0.0, weight) if hosts is cold else weight)[experts],
                slots[hosts],
                speed[hosts],
                node[hosts],
                required=wanted[experts],
                now=held[within] if held[within].any() else None,
                group=None if group is None else group[experts],
                min_gain=min_gain,
            )
            plan.add(part, hosts, experts)
    return plan.result()


def _cold_copies(load: Floats, slots: Ints, held: Bools, *, keep: bool) -> Ints:
    """[E] copies on the cold hosts, given their slots [C] and what they hold [C, E]: one each of the coldest, then a second."""
    experts = len(load)
    left = int(np.minimum(slots, experts).sum())
    copies = np.zeros(experts, dtype=np.int64)
    while left > 0:
        number = min(left, experts)
        copies += coldest(load, number, held.sum(axis=0) > copies.max(), keep=keep)
        left -= number
    return copies


def _needed_elsewhere(load: Floats, copies: Ints, required: Ints, *, room: int) -> Bools:
    """[E] experts that the other hosts hold: all that the cold tier has not, then what needs more copies, as far as there is
    room."""
    needed: Bools = copies == 0
    more = np.flatnonzero(~needed & (required > copies))
    busiest = more[np.argsort(-load[more], kind="stable")]
    needed[busiest[: max(0, room - int(needed.sum()))]] = True
    return needed


class _Merged:
    """The plans of both kinds of hosts as one."""

    def __init__(self, load: Floats, slots: Ints, speed: Floats, cold: Bools, now: Bools) -> None:
        self._load, self._slots, self._speed, self._cold, self._now = load, slots, speed, cold, now
        hosts, experts = now.shape
        self._held = np.zeros_like(now)
        self._counts = np.zeros((3, experts), dtype=np.int64)
        self._host_load = np.zeros(hosts)
        self._hot: LayerPlan | None = None

    def add(self, part: LayerPlan, hosts: Bools, experts: Bools) -> None:
        """The plan of some hosts for some experts."""
        self._held[np.ix_(hosts, experts)] = part.held
        self._counts[:, experts] += np.stack((part.granted, part.spread, part.covered))
        self._host_load[hosts] = part.host_load if self._load.any() else 0.0
        if hosts is not self._cold:
            self._hot = part

    def result(self) -> LayerPlan:
        granted, spread, covered = self._counts
        before = tiered_balancedness(self._load, self._now, self._slots, self._speed, self._cold)
        expected = 1.0 if self._hot is None else self._hot.balancedness
        equal = 1.0 if self._hot is None else self._hot.equal
        return LayerPlan(self._held, granted, spread, covered, self._host_load, expected, before, equal)


def tiered_balancedness(load: Floats, held: Bools, slots: Ints, speed: Floats, cold: Bools) -> float:
    """Mean over maximum of the load over speed of the hosts that are not cold, for what they hold; 0 if an expert that has
    load is nowhere, 1 if these hosts have no load.

    Args:
        load: [E]; all 0 is taken for equal loads.
        held: [H, E] which host holds which expert.
        slots, speed, cold: [H].
    """
    weight = load if load.any() else np.ones_like(load)
    if weight[~held.any(axis=0)].any():
        return 0.0
    if cold.all():
        return 1.0
    others = np.where(held[~cold].any(axis=0), weight, 0.0)
    return balancedness(shared_load(others, held[~cold], speed[~cold], until=1.0), speed[~cold], slots[~cold])


def cold_shares(load: Floats, table: PlacementTable) -> tuple[float, float]:
    """The share of all load that is for experts which cold hosts alone hold, and the least it could be with as many of them.

    Args:
        load: [L, E] load of each expert.
        table: who holds what.
    """
    total = float(load.sum())
    if total <= 0 or not any(map(is_cold, table.slots)):
        return 0.0, 0.0
    now = least = 0.0
    for index, weight in enumerate(load):
        alone = np.ones(table.experts, dtype=np.bool_)
        for host, layers in table.slots.items():
            if not is_cold(host):
                alone[[expert for expert in layers[index] if expert != EMPTY]] = False
        now += float(weight[alone].sum())
        least += float(np.sort(weight)[: int(alone.sum())].sum())
    return now / total, least / total
