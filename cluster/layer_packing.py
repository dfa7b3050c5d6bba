"""One layer's experts on hosts while a plan is made: the working state and the steps that change it.

Nothing here is random and every choice among equals falls on the lowest index, so the same input gives the same plan.
"""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

from .replica_counts import Floats, Ints

Bools = npt.NDArray[np.bool_]

_MAX_STEPS = 2000
"""Improvement steps in one layer; a bound for odd inputs, 3 to 60 are usual."""

_WORTHWHILE = 2e-4
"""Steps that relieve the busiest host by a smaller share than this are left: what they win is below any measurement."""

_HEAVIEST = 0.9
"""Share of a host's fair load that one replica may have before its expert's load calls for another."""

_PARTNERS = 6
"""Replicas on either side in order of load that `gather` tries to swap with: loads further apart seldom fit."""


def balancedness(host_load: Floats, speed: Floats, slots: Ints) -> float:
    """Mean over maximum of the hosts' load over speed [H], the mean weighted by speed; hosts without slots do not count."""
    busiest = float((host_load / speed).max())
    return 1.0 if busiest <= 0 else min(1.0, float(host_load.sum()) / float(speed[slots > 0].sum()) / busiest)


class LayerPacking:
    """Replicas of one layer's experts, at most one of each on a host.

    The load of an expert is taken to be split equally between its replicas, but for those set up as spares, which get none:
    they are there for the day another replica is lost. A host's *time* is its load over its speed.

    Args:
        load: [E] load of each expert.
        slots: [H] slots of each host.
        speed: [H] relative speed of each host.
        node: [H] index of each host's node.
        required: [E] replicas of each expert that no improvement may take away.
        spread: [E] on how many distinct nodes each expert should be.
        held: [H, E] which host holds which expert to begin with; no host more than its slots.
    """

    def __init__(
        self, load: Floats, slots: Ints, speed: Floats, node: Ints, required: Ints, spread: Ints, held: Bools
    ) -> None:
        self._weight = load
        self._slots = slots
        self._speed = speed
        self._node = node
        self._required = required
        self._spread = spread
        self._spreads = bool((spread > 1).any())
        self.held = held.copy()
        self.count = self.held.sum(axis=0)
        self._active = self.held.copy()  # all but the spares
        self._sharers = self.count.copy()
        self._free = slots - self.held.sum(axis=1)
        on = np.arange(int(node.max()) + 1)[:, None] == node[None, :]
        self._on_node = (on.astype(np.float64) @ self.held.astype(np.float64)).astype(np.int64)
        self._ideal_time = float(load.sum()) / float(speed[slots > 0].sum())
        self._host_load = self.held @ self._part

    @property
    def _part(self) -> Floats:
        """[E] load of one replica of each expert, unless it is a spare."""
        part: Floats = self._weight / np.maximum(self._sharers, 1)
        return part

    @property
    def covered(self) -> Ints:
        """[E] distinct nodes each expert is on."""
        covered: Ints = (self._on_node > 0).sum(axis=0)
        return covered

    def balancedness(self) -> float:
        """As the function of that name, of what is held now."""
        return balancedness(self._host_load, self._speed, self._slots)

    # ---- changing it

    def _set(self, host: int, expert: int, held: bool, *, spare: bool = False) -> None:
        """Add or take away one replica; the expert's other replicas take its share or give theirs."""
        change = 1 if held else -1
        self.held[host, expert] = held
        self.count[expert] += change
        self._free[host] -= change
        self._on_node[self._node[host], expert] += change
        if held and not spare and not self._sharers[expert]:  # the usual case, and it need not look at other hosts
            self._active[host, expert] = True
            self._sharers[expert] = 1
            self._host_load[host] += self._weight[expert]
        elif not spare:
            column = self._active[:, expert]
            self._host_load[column] -= self._weight[expert] / max(1, self._sharers[expert])
            self._active[host, expert] = held
            self._sharers[expert] += change
            self._host_load[column] += self._weight[expert] / max(1, self._sharers[expert])

    def _shift(self, expert: int, source: int, target: int) -> None:
        """Move one replica from host to host."""
        self.held[source, expert], self.held[target, expert] = False, True
        self._free[source] += 1
        self._free[target] -= 1
        self._on_node[self._node[source], expert] -= 1
        self._on_node[self._node[target], expert] += 1
        if self._active[source, expert]:
            part = self._weight[expert] / self._sharers[expert]
            self._active[source, expert], self._active[target, expert] = False, True
            self._host_load[source] -= part
            self._host_load[target] += part

    def set_counts(self, counts: Ints, *, home: Ints | None = None, spares: bool = False) -> None:
        """Make the replicas as many as `counts` [E], which must fit (`replica_counts`), disturbing the others little.

        Surplus replicas go from the busiest hosts; new ones go, the heaviest first, to the least busy ones.

        Args:
            counts: replicas of each expert.
            home: [E] node each expert would rather be on, where a host there is not yet busier than it will be on average.
            spares: new replicas that their experts' load does not call for are spares. Spares fill the slots beside a heavy
                replica, where whatever has load would be too much. Only for a packing that holds nothing yet.
        """
        for expert in np.flatnonzero(self.count > counts):
            while self.count[expert] > counts[expert]:
                self._set(self._dispensable(int(expert)), int(expert), False)
        lacking = np.flatnonzero(self.count < counts)
        sharers = counts
        if spares:
            sharers = self._called_for(counts)
        part = self._weight / sharers
        for expert in lacking[np.argsort(-part[lacking], kind="stable")]:
            while self.count[expert] < sharers[expert]:
                self._place(int(expert), float(part[expert]), None if home is None else int(home[expert]))
        for expert in lacking:
            while self.count[expert] < counts[expert]:
                self._place(int(expert), 0.0, None, spare=True)

    def _called_for(self, counts: Ints) -> Ints:
        """[E] how many of `counts` replicas the experts' load calls for; the others may be spares."""
        most = _HEAVIEST * self._ideal_time * float(self._speed.mean())
        sharers: Ints = np.clip(np.ceil(self._weight / most).astype(np.int64), 1, counts)
        return sharers

    def set_up_spares(self) -> None:
        """Make spares of replicas that load does not call for: those on the hosts that are busiest without them."""
        sharers = self._called_for(self.count)
        several = sharers < self.count
        self._active = self.held & ~several[None, :]
        self._sharers = sharers
        self._host_load = self._active @ self._part
        for expert in np.flatnonzero(several)[np.argsort(-self._weight[several], kind="stable")]:
            hosts = np.flatnonzero(self.held[:, expert])
            order = np.argsort(self._host_load[hosts] / self._speed[hosts], kind="stable")
            chosen = hosts[order[: sharers[expert]]]
            self._active[chosen, expert] = True
            self._host_load[chosen] += self._weight[expert] / sharers[expert]

    def _dispensable(self, expert: int) -> int:
        """The host that is to give up its replica of `expert`: the busiest, but rather one of two on the same node."""
        hosts = np.flatnonzero(self.held[:, expert])
        crowded = self._on_node[self._node[hosts], expert] > 1
        if crowded.any() and self.covered[expert] <= self._spread[expert]:
            hosts = hosts[crowded]
        return int(hosts[np.argmax(self._host_load[hosts] / self._speed[hosts])])

    def _place(self, expert: int, part: float, home: int | None, *, spare: bool = False) -> None:
        """Add a replica of `expert`, on a further node as long as it should be spread; make room if need be."""
        open_to = ~self.held[:, expert] & (self._free > 0)
        if not open_to.any():
            open_to[self._make_room(expert)] = True
        if self._spread[expert] > 1 and (self._on_node[:, expert] > 0).sum() < self._spread[expert]:
            fresh = open_to & (self._on_node[self._node, expert] == 0)
            open_to = fresh if fresh.any() else open_to
        times = (self._host_load + part) / self._speed
        if home is not None:
            at_home = open_to & (self._node == home) & (times <= self._ideal_time)
            open_to = at_home if at_home.any() else open_to
        times[~open_to] = np.inf
        self._set(int(np.argmin(times)), expert, True, spare=spare)

    def _make_room(self, expert: int) -> int:
        """Free a slot on a host without `expert` by the shortest chain of moves, and return the host.

        A breadth-first search for an augmenting path: it finds one whenever the counts fit.
        """
        came_from: dict[int, tuple[int, int]] = {}
        frontier = [int(host) for host in np.flatnonzero(~self.held[:, expert] & (self._slots > 0))]
        seen = np.zeros(len(self._slots), dtype=np.bool_)
        seen[frontier] = True
        part = self._part
        while frontier:
            reached: list[int] = []
            for source in frontier:
                for target in np.flatnonzero(~seen & (self._slots > 0)):
                    movable = np.flatnonzero(self.held[source] & ~self.held[target])
                    if not len(movable):
                        continue
                    came_from[int(target)] = source, int(movable[np.argmin(part[movable])])
                    seen[target] = True
                    reached.append(int(target))
            free = [host for host in reached if self._free[host] > 0]
            if free:
                host = free[0]
                while host in came_from:
                    source, moved = came_from[host]
                    self._shift(moved, source, host)
                    host = source
                return host
            frontier = reached
        raise AssertionError(f"no host can take another replica of expert {expert}: the counts do not fit the slots")

    def fill(self) -> None:
        """Put into empty slots the replicas that relieve the most, without moving any other for it."""
        while (hosts := np.flatnonzero(self._free > 0)).size:
            fits = ~self.held[hosts].all(axis=0)
            if not fits.any():
                return
            expert = int(np.argmax(np.where(fits, self._part, -1.0)))
            hosts = hosts[~self.held[hosts, expert]]
            self._set(int(hosts[np.argmin(self._host_load[hosts] / self._speed[hosts])]), expert, True)

    # ---- making it better

    def spread_out(self) -> None:
        """Bring replicas to further nodes where an expert is on fewer than it should be and one exchange can help."""
        for expert in np.flatnonzero(self.covered < np.minimum(self._spread, self.count)):
            while self.covered[expert] < min(self._spread[expert], self.count[expert]):
                sources = self.held[:, expert] & (self._on_node[self._node, expert] > 1)
                targets = (self._on_node[self._node, expert] == 0) & (self._slots > 0)
                best: tuple[float, int, int, int] | None = None
                for source in np.flatnonzero(sources):
                    found = self._exchange(int(source), np.asarray([expert]), self._slots_now(targets))
                    if found is not None and (best is None or found[0] < best[0]):
                        best = found[0], int(source), found[2], found[3]
                if best is None:
                    break
                self._swap(int(expert), best[1], best[3], best[2])

    def improve(self, *, until: float, replicate: bool) -> None:
        """Relieve the busiest host, step by step, until balancedness reaches `until` or no step helps.

        A step swaps two replicas, moves one into an empty slot or, with `replicate`, overwrites a replica that nobody
        requires with one more of an expert of the busiest host. What relieves most per slot loaded is taken.
        """
        floor = self._ideal_time / until
        for _ in range(_MAX_STEPS):
            times = self._host_load / self._speed
            busiest = int(np.argmax(times))
            before = float(times[busiest])
            if before <= floor:
                return
            slots = self._slots_now()
            steps: list[tuple[float, float, str, tuple[int, int, int]]] = []
            swap = self._exchange(busiest, np.flatnonzero(self.held[busiest]), slots)
            if swap is not None and swap[0] < before * (1 - _WORTHWHILE):
                cost = 1 if swap[3] < 0 else 2
                steps.append(((max(swap[0], floor) - before) / cost, swap[0], "swap", swap[1:]))
            more = self._replication(busiest, slots) if replicate else None
            if more is not None and more[0] < before * (1 - _WORTHWHILE):
                steps.append((max(more[0], floor) - before, more[0], "replicate", more[1:]))
            if not steps:
                return
            _, _, kind, (expert, host, other) = min(steps)
            if kind == "swap":
                self._swap(expert, busiest, other, host)
            else:
                if other >= 0:
                    self._set(host, other, False)
                self._set(host, expert, True)

    def _swap(self, expert: int, source: int, other: int, target: int) -> None:
        """Replica of `expert` from source to target, of `other` back; -1 is an empty slot."""
        self._shift(expert, source, target)
        if other >= 0:
            self._shift(other, target, source)

    def _slots_now(self, only: Bools | None = None) -> tuple[Ints, Ints]:
        """(host, expert) of every replica and, with expert -1, of every host that has an empty slot: two arrays [P].

        Args:
            only: [H] the hosts to look at; all by default.
        """
        held, free = self.held, self._free > 0
        if only is not None:
            held, free = held & only[:, None], free & only
        hosts, others = np.nonzero(held)
        empty = np.flatnonzero(free)
        if len(empty):
            hosts = np.concatenate((hosts, empty))
            others = np.concatenate((others, np.full(len(empty), -1)))
        return hosts, others

    def _exchange(self, source: int, experts: Ints, slots: tuple[Ints, Ints]) -> tuple[float, int, int, int] | None:
        """The best exchange of one of `experts` on `source` for what is in one of `slots` (see `_slots_now`).

        Returns:
            the longer of the two hosts' times afterwards, the expert, the other host and its expert (-1: empty slot).
        """
        part = self._part
        hosts, others = slots
        if not len(hosts):
            return None
        # Hosts that hold the expert already are out, and with them the source itself.
        allowed = ~self.held[hosts[None, :], experts[:, None]]
        allowed &= (~self.held[source, others] | (others < 0))[None, :]
        if self._spreads:
            allowed &= self._keeps_spread(experts, source, hosts)
            allowed &= self._returns_spread(others, hosts, source)[None, :]
        leaving = part[experts] * self._active[source, experts]
        arriving = part[others] * (self._active[hosts, others] & (others >= 0))
        given = leaving[:, None] - arriving[None, :]
        after = np.maximum(
            (self._host_load[source] - given) / self._speed[source],
            (self._host_load[hosts][None, :] + given) / self._speed[hosts][None, :],
        )
        after[~allowed] = np.inf
        best = int(np.argmin(after))
        row, column = divmod(best, len(hosts))
        if not np.isfinite(after[row, column]):
            return None
        return float(after[row, column]), int(experts[row]), int(hosts[column]), int(others[column])

    def _keeps_spread(self, experts: Ints, source: int, hosts: Ints) -> Bools:
        """[A, P]: `experts` [A] may leave `source` for `hosts` [P] and stay on as many nodes as they should be."""
        here, on_node, spread = self._node[source], self._on_node, self._spread
        keeps = np.ones((len(experts), len(hosts)), dtype=np.bool_)
        # Only an expert that is alone on its node, and on no more nodes than need be, can lose by it.
        for row in np.flatnonzero((spread[experts] > 1) & (on_node[here, experts] == 1)):
            expert = experts[row]
            if self.covered[expert] <= spread[expert]:
                keeps[row] = ((on_node[:, expert] == 0)[self._node] | (self._node == here))[hosts]
        return keeps

    def _returns_spread(self, others: Ints, hosts: Ints, target: int) -> Bools:
        """[P]: `others` [P] (-1: nothing) may leave `hosts` [P] for `target`."""
        covered, there = self.covered, self._node[target]
        needed = (covered <= self._spread) & (self._spread > 1)
        gained = self._on_node[there] == 0
        nodes = self._node[hosts]
        keeps: Bools = (
            ~needed[others] | (self._on_node[nodes, others] > 1) | gained[others] | (nodes == there) | (others < 0)
        )
        return keeps

    def _replication(self, busiest: int, slots: tuple[Ints, Ints]) -> tuple[float, int, int, int] | None:
        """The best further replica of an expert on `busiest`, in an empty slot or over a replica nobody requires.

        Returns:
            the longest time of the hosts whose load grows and of `busiest` afterwards, the expert, the host it goes to and
            the expert whose replica it overwrites (-1: empty slot).
        """
        hosts, others = slots
        open_to = (self.count > self._required)[others]
        if self._spreads:
            # A replica that is alone on its node may go only where more nodes are covered than need be.
            open_to &= (self._on_node[self._node[hosts], others] > 1) | (self.covered > self._spread)[others]
        open_to |= others < 0
        hosts, others = hosts[open_to], others[open_to]
        experts = np.flatnonzero(self.held[busiest])
        allowed = ~self.held[hosts[None, :], experts[:, None]]
        if not allowed.any():
            return None
        count, speed, load = self.count, self._speed, self._host_load
        new_part = self._weight[experts] / (count[experts] + 1)
        relief = self._weight[experts] / count[experts] - new_part
        dropped = np.where(others < 0, 0.0, self._weight[others] / count[others])
        added = np.where(others < 0, 0.0, self._weight[others] / np.maximum(1, count[others] - 1)) - dropped
        holders = self.held[:, others].T & (others >= 0)[:, None]
        grown = np.where(holders, (load[None, :] + added[:, None]) / speed[None, :], 0.0)
        grown[np.arange(len(hosts)), hosts] = 0.0
        grown[:, busiest] = 0.0
        after = np.maximum(grown.max(axis=1)[None, :], (load[hosts] - dropped + new_part[:, None]) / speed[hosts])
        own = load[busiest] - relief[:, None] + (added * holders[:, busiest])[None, :]
        after = np.maximum(after, own / speed[busiest])
        after[~allowed] = np.inf
        row, column = divmod(int(np.argmin(after)), len(hosts))
        return float(after[row, column]), int(experts[row]), int(hosts[column]), int(others[column])

    def gather(self, home: Ints) -> None:
        """Bring replicas to their expert's `home` [E] node by swaps that leave no host busier than the busiest is now."""
        limit = float((self._host_load / self._speed).max()) * (1 + 1e-9)
        part = self._part * self._active
        strayed = [
            (float(part[host, expert]), int(host), int(expert))
            for host, expert in zip(*np.nonzero(self.held), strict=True)
            if self._node[host] != home[expert]
        ]
        # By way out and way home: those who go the opposite way gain twice, others who are not at home either once.
        leaving: dict[int, list[tuple[float, int, int]]] = {}
        for found in sorted(strayed):
            leaving.setdefault(int(self._node[found[1]]), []).append(found)
        for weight, host, expert in sorted(strayed, reverse=True):
            if not self.held[host, expert] or self._node[host] == home[expert]:
                continue
            partners = leaving.get(int(home[expert]), [])
            middle = bisect.bisect_left(partners, (weight, -1, -1))
            near = partners[max(0, middle - _PARTNERS) : middle + _PARTNERS]
            near.sort(key=lambda p: (home[p[2]] != self._node[host], abs(p[0] - weight), p[1:]))
            for other_weight, other_host, other in near:
                if self._may_swap(weight - other_weight, limit, (host, expert), (other_host, other)):
                    self._swap(expert, host, other, other_host)
                    partners.remove((other_weight, other_host, other))
                    break

    def _may_swap(self, given: float, limit: float, one: tuple[int, int], two: tuple[int, int]) -> bool:
        """Whether replicas `one` and `two`, each (host, expert), may change places so that no host's time passes `limit`."""
        (host, expert), (other_host, other) = one, two
        if not self.held[other_host, other] or self.held[host, other] or self.held[other_host, expert]:
            return False
        if (self._host_load[host] - given) / self._speed[host] > limit:
            return False
        if (self._host_load[other_host] + given) / self._speed[other_host] > limit:
            return False
        if not self._spreads:
            return True
        there, here = np.asarray([other_host]), np.asarray([other])
        return bool(self._keeps_spread(np.asarray([expert]), host, there) & self._returns_spread(here, there, host))
