"""Which replica computes which (token, expert) pair of a step: a pure function of the step's top-k and the replica table.

The choice moves work, never results: a pair's output depends on its token and expert alone, and outputs are summed in top-k
order wherever they were computed. So routers need not agree with each other, and a table with more, fewer or other replicas
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .routes import IntArray

_SWEEPS = 2
"""Times each expert's pairs are shared out. A second time lets the first experts react to the last; a third won nothing on
Zipf loads at 32 hosts."""


def choose_replicas(
    experts: IntArray,
    hosts: IntArray,
    count: IntArray,
    *,
    load: IntArray | None = None,
    speed: Sequence[float] | None = None,
) -> IntArray:
    """Choose a replica for every pair so that the hosts' pairs, over their speed, come out as even as can be.

    Experts with one replica are what they are. The others follow, those with the fewest replicas first, each poured over its
    hosts to one level. Within an expert the pairs go to its replicas in runs, in the order they have here.

    Args:
        experts: [P] expert of each pair.
        hosts: [R, E] index of the host of each replica of each expert; entries from `count` on are not looked at.
        count: [E] replicas of each expert that can be reached, at least 1 for each expert that has a pair.
        load: [E] pairs of each expert, where it is known already.
        speed: relative speed of each host; equal by default.

    Returns:
        [P] numbers of replicas: `hosts[choice, experts]` are the hosts.
    """
    assert hosts.shape[1:] == count.shape, (hosts.shape, count.shape)
    pairs = np.bincount(experts, minlength=len(count)) if load is None else load
    choice = np.zeros(len(experts), dtype=np.int64)
    several = np.flatnonzero((count > 1) & (pairs > 0))
    if len(several):
        quotas = _quotas(pairs, hosts, count, several, speed)
        free = np.flatnonzero((count > 1)[experts])
        # A stable sort by expert puts each expert's pairs in the order of rows, as the quotas are.
        order = free[np.argsort(experts[free], kind="stable")]
        numbers = [number for quota in quotas for number in range(len(quota))]
        choice[order] = np.repeat(numbers, [share for quota in quotas for share in quota])
    return choice


def _quotas(
    pairs: IntArray, hosts: IntArray, count: IntArray, several: IntArray, speed: Sequence[float] | None
) -> list[list[int]]:
    """How many of its pairs [E] each replica of the experts in `several` takes."""
    single = np.flatnonzero((count == 1) & (pairs > 0))
    speeds = [1.0] * (int(hosts.max()) + 1) if speed is None else list(speed)
    busy: list[int] = np.bincount(hosts[0, single], weights=pairs[single], minlength=len(speeds)).astype(int).tolist()
    wanted: list[int] = pairs[several].tolist()
    own: list[list[int]] = [hosts[: count[e], e].tolist() for e in several]
    quotas = [[0] * len(where) for where in own]
    order = sorted(range(len(own)), key=lambda i: (len(own[i]), -wanted[i], i))
    for _ in range(_SWEEPS):
        for i in order:
            where, quota = own[i], quotas[i]
            for h, share in zip(where, quota, strict=True):
                busy[h] -= share
            base, rates = [busy[h] for h in where], [speeds[h] for h in where]
            quota[:] = [int(share) for share in pour(wanted[i], base, rates)]
            for _ in range(wanted[i] - sum(quota)):
                least = min(range(len(where)), key=lambda r: (base[r] + quota[r] + 1) / rates[r])
                quota[least] += 1
            for h, share in zip(where, quota, strict=True):
                busy[h] += share
    return quotas


def pour(amount: float, base: Sequence[float], speed: Sequence[float]) -> list[float]:
    """Split `amount` over vessels that hold `base` already, to one level of (base + share) / speed where they get any."""
    order = sorted(range(len(base)), key=lambda i: base[i] / speed[i])
    level = wide = held = 0.0
    for i in order:
        if wide and base[i] / speed[i] >= level:
            break
        held += base[i]
        wide += speed[i]
        level = (amount + held) / wide
    return [max(0.0, level * s - b) for b, s in zip(base, speed, strict=True)]
