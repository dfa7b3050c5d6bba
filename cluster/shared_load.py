"""What load to expect on the hosts when every step's tokens are shared out between an expert's replicas."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..actors.replica_choice import pour
from .replica_counts import Floats

_SWEEPS = 12
"""Times every replicated expert is shared out again; 2 to 5 are enough where the hosts can be made equal at all."""


def shared_load(load: Floats, held: npt.NDArray[np.bool_], speed: Floats, *, until: float) -> Floats:
    """Load of each host if tokens go to whichever replica's host is least busy, as the routers' replica choice has it.

    Expert by expert, again and again, the load is poured over the hosts of its replicas to one level of load over speed.
    That is coordinate descent on a convex function whose least point has the least possible maximum.

    Args:
        load: [E] load of each expert.
        held: [H, E] which host holds which expert; every expert with load is somewhere.
        speed: [H] relative speed of each host.
        until: stop when the mean over maximum of load over speed has reached this.

    Returns:
        [H] load of each host.
    """
    count = held.sum(axis=0)
    speeds = speed.tolist()
    busy: list[float] = (held @ (load / np.maximum(count, 1))).tolist()
    usable = held.any(axis=1)
    level = float(load.sum()) / float(speed[usable].sum()) / until if usable.any() else 0.0
    several = [int(e) for e in np.flatnonzero((count > 1) & (load > 0))]
    hosts = [np.flatnonzero(held[:, e]).tolist() for e in several]
    weights = [float(load[e]) for e in several]
    shares = [[weight / len(own)] * len(own) for weight, own in zip(weights, hosts, strict=True)]
    worst = max(b / s for b, s in zip(busy, speeds, strict=True))
    for _ in range(_SWEEPS):
        if worst <= level:
            break
        for weight, own, share in zip(weights, hosts, shares, strict=True):
            for i, h in enumerate(own):
                busy[h] -= share[i]
            share[:] = pour(weight, [busy[h] for h in own], [speeds[h] for h in own])
            for i, h in enumerate(own):
                busy[h] += share[i]
        before, worst = worst, max(b / s for b, s in zip(busy, speeds, strict=True))
        if worst > before * (1 - 5e-4):
            break
    return np.asarray(busy)
