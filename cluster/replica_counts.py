"""How many replicas each expert of one layer gets: a pure function of its load and of the hosts' slots.

Replicas of one expert are on distinct hosts, so not every set of counts can be placed: counts c of E experts fit hosts with
s slots if and only if, for every k, the k largest counts sum to at most `sum(min(s, k))` (Gale and Ryser's theorem on the
degrees of bipartite graphs). The sets that fit form a polymatroid: counts may be raised one by one in order of what each
replica is worth, and one that cannot be raised now never can be later.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class _Room:
    """Which counts fit the hosts' slots."""

    def __init__(self, slots: Ints, experts: int) -> None:
        usable = np.minimum(slots, experts)
        self.hosts = int((usable > 0).sum())
        self.total = int(usable.sum())
        self._even = bool((usable == self.total // max(1, len(usable))).all())
        self._first_k = np.minimum(usable[:, None], np.arange(1, experts + 1)[None, :]).sum(axis=0)

    def fits(self, counts: Ints) -> bool:
        """Whether `counts` [E] can be placed without two replicas of one expert on one host."""
        if int(counts.max()) > self.hosts or int(counts.sum()) > self.total:
            return False
        # Hosts of one size take any counts that pass the two tests above.
        return self._even or bool((np.cumsum(np.sort(counts)[::-1]) <= self._first_k).all())


def slots_short(slots: Ints, experts: int) -> int:
    """Slots that are missing to hold each of `experts` once; slots [H] beyond one host's `experts` help nobody."""
    return max(0, experts - int(np.minimum(slots, experts).sum()))


def replica_counts(load: Floats, slots: Ints, required: Ints, current: Ints, *, fill: bool = True) -> tuple[Ints, Ints]:
    """How many replicas of every expert the slots are to take.

    In this order: one for each expert; what is required, the lowest counts first and the hottest experts first among equals;
    what there is now, so that nothing moves for no reason; and, with `fill`, in slots that are left over the replicas that
    relieve the most: always one more of the expert with the highest load per replica.

    Args:
        load: [E] load of each expert, at least 0.
        slots: [H] slots of each host.
        required: [E] replicas each expert should have, at least 1.
        current: [E] replicas each expert has now; zeros for a plan from nothing.
        fill: leave no slot empty that can be used.

    Returns:
        counts [E] and granted [E]: how much of `required` could be met. Slots must suffice for one replica each.
    """
    experts = len(load)
    room = _Room(slots, experts)
    counts = np.ones(experts, dtype=np.int64)
    assert room.fits(counts), "slots_short() is to be asked first"
    counts = _raise_together(counts, np.maximum(required, 1), room, load, lowest_first=True)
    granted = np.minimum(counts, required)
    counts = _raise_together(counts, current, room, load, lowest_first=False)
    if fill:
        counts = _raise_by_load(counts, np.full(experts, room.hosts), room, load, lowest_first=False)
    return counts, granted


def _raise_together(counts: Ints, goal: Ints, room: _Room, load: Floats, *, lowest_first: bool) -> Ints:
    """Raise to `goal` [E] at once where that fits, else as far as it goes."""
    raised = np.maximum(counts, goal)
    return raised if room.fits(raised) else _raise_by_load(counts, raised, room, load, lowest_first=lowest_first)


def _raise_by_load(counts: Ints, goal: Ints, room: _Room, load: Floats, *, lowest_first: bool) -> Ints:
    """Raise one by one towards `goal` [E]: the highest load per replica first; by rounds with `lowest_first`."""
    counts = counts.copy()

    def key(expert: int) -> tuple[float, float, int]:
        count = int(counts[expert])
        relieved = -float(load[expert]) / count
        return (count, relieved, expert) if lowest_first else (relieved, count, expert)

    heap = [key(int(expert)) for expert in np.flatnonzero(counts < goal)]
    heapq.heapify(heap)
    left = room.total - int(counts.sum())
    while heap and left > 0:
        expert = heapq.heappop(heap)[2]
        counts[expert] += 1
        if not room.fits(counts):
            counts[expert] -= 1
            continue
        left -= 1
        if counts[expert] < goal[expert]:
            heapq.heappush(heap, key(expert))
    return counts
