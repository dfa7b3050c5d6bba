"""The plan of one layer: keep what there is, repair it, improve it or lay it out anew. A pure function of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layer_packing import Bools, LayerPacking, balancedness
from .replica_counts import Floats, Ints, replica_counts
from .shared_load import shared_load

MIN_GAIN = 0.03
"""Balancedness a layer must be able to win before a replica moves for it.

Swept over 0.02 to 0.05 on 58 layers x 256 experts, 32 hosts, with 5% noise in the load: up to 4.7%, 1.9%, 0.7%, 0.1% of the
slots moved the first time, up to 6.4%, 3.7%, 1.5%, 0.2% when every later plan met another noise.
"""

_GOOD_ENOUGH = 0.9995
"""Balancedness at which a plan from nothing stops improving."""

_GOOD_WITH_SPARES = 0.99
"""The same for a plan with spares, whose expected balancedness is better still: the spares' hosts take load, too."""

_FOR_NOTHING = 0.001
"""Balancedness that keeping groups together may cost while it still counts as costing nothing."""

_ANEW = 2.0
"""Times `min_gain` that a layout from nothing must win over the improved one, as it moves nine slots of ten."""

_FAR_OFF = 0.25
"""Below this share of the best balancedness the number of replicas is set at once, as for a plan from nothing.

With other experts hot than before (Zipf 1.0) that halves the time and moves 25% of the slots instead of 34%; at 0.4 and more
it moves up to 8% more of them where loads are less skewed.
"""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One planned layer of E experts on H hosts.

    Attributes:
        held: [H, E] which host is to hold which expert.
        granted: [E] how many of the required replicas there are.
        spread: [E] on how many nodes those should be.
        covered: [E] nodes each expert is on.
        host_load: [H] load to expect with tokens shared out between replicas.
        balancedness: mean over maximum of `host_load` over speed.
        before: the same of what was held, 0 if some expert was not.
        equal: the same with every expert's load split equally between its replicas.
    """

    held: Bools
    granted: Ints
    spread: Ints
    covered: Ints
    host_load: Floats
    balancedness: float
    before: float
    equal: float


def plan_layer(
    load: Floats,
    slots: Ints,
    speed: Floats,
    node: Ints,
    *,
    required: Ints,
    now: Bools | None = None,
    group: Ints | None = None,
    min_gain: float = MIN_GAIN,
) -> LayerPlan:
    """Plan a layer: get near the best balancedness, where that is further than `min_gain`, with few moves.

    What is required is repaired and empty slots are filled in any case. If that is balanced well enough nothing else moves;
    if not, it is improved step by step; only if that does not get there is the layer laid out anew.

    Args:
        load: [E] load of each expert; all 0 means that it is not known and taken to be equal.
        slots: [H] slots of each host; together enough for every expert (`replica_counts.slots_short`).
        speed: [H] relative speeds.
        node: [H] index of each host's node.
        required: [E] replicas each expert should have.
        now: [H, E] what is held now; no host more than its slots.
        group: [E] number of the gate's group that each expert is in; with it, groups are kept on one node where that costs
            nothing.
        min_gain: see `MIN_GAIN`; with 1 nothing is improved and only what must be moves.
    """
    weight = load if load.any() else np.ones_like(load)
    nothing = np.zeros((len(slots), len(load)), dtype=np.bool_)
    held = nothing if now is None else now
    counts, granted = replica_counts(weight, slots, required, held.sum(axis=0), fill=not held.any())
    nodes = len(np.unique(node[slots > 0]))
    spread = np.minimum(granted, nodes)

    def packing(held: Bools) -> LayerPacking:
        return LayerPacking(weight, slots, speed, node, granted, spread, held)

    def shared(held: Bools, until: float = _GOOD_ENOUGH) -> float:
        return balancedness(shared_load(weight, held, speed, until=until), speed, slots)

    def result(chosen: LayerPacking) -> LayerPlan:
        host_load = shared_load(load, chosen.held, speed, until=1.0)
        before = shared(held) if held.any(axis=0).all() else 0.0
        expected = balancedness(host_load, speed, slots)
        equal = packing(chosen.held).balancedness()
        return LayerPlan(chosen.held, granted, spread, chosen.covered, host_load, expected, before, equal)

    kept = packing(held)
    if held.any():
        kept.set_counts(counts)
        kept.spread_out()
        kept.fill()
        enough = 1 - min_gain
        if enough <= 0 or kept.balancedness() >= enough or shared(kept.held, enough) >= enough:
            return result(kept)
    anew = replica_counts(weight, slots, required, np.zeros_like(counts))[0] if held.any() else counts
    home = _home_nodes(weight, group, slots, speed, node) if group is not None and nodes > 1 else None
    fresh = _lay_out(packing(nothing), anew, home)
    if home is not None and fresh.balancedness() < 1 - _FOR_NOTHING:
        blind = _lay_out(packing(nothing), anew, None)
        if blind.balancedness() > fresh.balancedness() + _FOR_NOTHING:
            fresh = blind
    best, spares = fresh.balancedness(), False
    if best < 1 - min_gain / 2 and (expected := shared(fresh.held)) < 1 - min_gain / 2:
        # Many replicas that are there for safety, not for load: nothing but spares fits beside the heaviest replicas.
        spared = _lay_out(packing(nothing), anew, None, spares=True)
        best = shared(spared.held)
        spares = best > expected + _FOR_NOTHING
        if spares:
            fresh = spared
        else:
            best = expected
    if held.any():
        if shared(kept.held, best - min_gain) < best - min_gain:
            _improve(kept, fresh.balancedness(), anew, min_gain=min_gain, spares=spares)
        # Laying out anew moves nearly everything: it must win more than a few moves must.
        if shared(kept.held, best - _ANEW * min_gain) >= best - _ANEW * min_gain:
            return result(kept)
    if home is not None:
        fresh.gather(home)
    return result(fresh)


def _lay_out(packing: LayerPacking, counts: Ints, home: Ints | None, *, spares: bool = False) -> LayerPacking:
    """Fill `packing`, which holds nothing yet."""
    packing.set_counts(counts, home=home, spares=spares)
    packing.spread_out()
    packing.improve(until=_GOOD_WITH_SPARES if spares else _GOOD_ENOUGH, replicate=False)
    return packing


def _improve(packing: LayerPacking, best: float, counts: Ints, *, min_gain: float, spares: bool) -> None:
    """Bring what there is near the `best` balancedness, that of a layer laid out anew with `counts` replicas."""
    # Half way between the threshold and the best: or the next noise would ask for moves again.
    until = best - min_gain / 2
    if spares:
        packing.set_up_spares()
        packing.improve(until=until, replicate=False)
        return
    if packing.balancedness() < best * _FAR_OFF:
        packing.set_counts(counts)
        packing.spread_out()
    packing.improve(until=until, replicate=True)


def _home_nodes(load: Floats, group: Ints, slots: Ints, speed: Floats, node: Ints) -> Ints:
    """[E] the node each expert's group should be on: heaviest groups first, to the node with the least for its speed."""
    weight = np.bincount(group, weights=load)
    able = np.bincount(node, weights=np.where(slots > 0, speed, 0.0))
    busy = np.zeros(len(able))
    home = np.zeros(len(weight), dtype=np.int64)
    for g in np.argsort(-weight, kind="stable"):
        times = np.divide(busy + weight[g], able, out=np.full(len(able), np.inf), where=able > 0)
        home[g] = np.argmin(times)
        busy[home[g]] += weight[g]
    homes: Ints = home[group]
    return homes
