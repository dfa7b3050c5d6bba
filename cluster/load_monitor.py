"""What is asked of each expert, and how busy the hosts are: measured from counters that only grow. No clock, no I/O.

`now` is in seconds on any clock that does not go backwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..actors.placement_table import EMPTY, PlacementTable, is_cold
from .cold_tier import cold_shares, tiered_balancedness
from .replica_counts import Floats


class LoadMonitor:
    """Tokens routed to each expert, older ones counting for less and less.

    Args:
        layers: layers with routed experts.
        experts: routed experts a layer.
        half_life_s: after so long a token counts half.
    """

    def __init__(self, layers: int, experts: int, *, half_life_s: float = 120.0) -> None:
        assert half_life_s > 0, half_life_s
        self._half_life_s = half_life_s
        self._load = np.zeros((layers, experts))
        self._counted: dict[str, npt.NDArray[np.int64]] = {}
        self._at: float | None = None

    def observe(self, router_id: str, expert_tokens: npt.NDArray[np.int64], now: float) -> None:
        """Take note of one router's counters.

        The first ones of a router are where counting begins: what they stand for happened at an unknown time. Where a number
        is smaller than before, another process has counted all of it since.

        Args:
            router_id: whose.
            expert_tokens: [L, E] tokens routed to each expert since the router's start.
            now: when they were read.
        """
        assert expert_tokens.shape == self._load.shape, (expert_tokens.shape, self._load.shape)
        if self._at is not None and now > self._at:
            self._load *= 0.5 ** ((now - self._at) / self._half_life_s)
        self._at = now if self._at is None else max(self._at, now)
        before = self._counted.get(router_id)
        if before is not None:
            same_process = bool((expert_tokens >= before).all())
            self._load += expert_tokens - before if same_process else expert_tokens
        self._counted[router_id] = expert_tokens.copy()

    def forget(self, router_id: str) -> None:
        """The router is gone; what it has counted remains, and fades. The next of its name begins anew."""
        self._counted.pop(router_id, None)

    @property
    def load(self) -> Floats:
        """[L, E] tokens routed to each expert, decayed to the last observation; zeros where nothing was measured."""
        return self._load.copy()

    @property
    def tokens(self) -> float:
        """Sum of `load`."""
        return float(self._load.sum())


class UtilisationMonitor:
    """The share of the time that each expert host computes.

    Args:
        window_s: over so much of the past.
    """

    def __init__(self, *, window_s: float = 15.0) -> None:
        assert window_s > 0, window_s
        self._window_s = window_s
        self._samples: dict[str, deque[tuple[float, float]]] = {}  # host -> (when, busy_s), oldest first

    def observe(self, host_id: str, busy_s: float, now: float) -> float:
        """Take note of the seconds a host has computed since its start; its utilisation, from 0 to 1.

        A smaller number than before is that of another process. 0 until there are two numbers of one process.
        """
        samples = self._samples.setdefault(host_id, deque())
        if samples and (busy_s < samples[-1][1] or now < samples[-1][0]):
            samples.clear()
        samples.append((now, busy_s))
        # The first sample is the last one that is as old as the window: the window is covered, whatever the intervals are.
        while len(samples) > 2 and samples[1][0] <= now - self._window_s:
            samples.popleft()
        return self._utilisation(samples)

    def mean(self, hosts: Iterable[str]) -> float:
        """Mean utilisation of those of `hosts` that were measured; 0 where none was."""
        measured = [samples for host in hosts if len(samples := self._samples.get(host, ())) > 1]
        return sum(map(self._utilisation, measured)) / len(measured) if measured else 0.0

    def forget(self, host_id: str) -> None:
        """The host is gone."""
        self._samples.pop(host_id, None)

    @staticmethod
    def _utilisation(samples: Sequence[tuple[float, float]]) -> float:
        (began, busy_then), (at, busy) = samples[0], samples[-1]
        return min(1.0, (busy - busy_then) / (at - began)) if at > began else 0.0


def balance(load: Floats, table: PlacementTable, speeds: Mapping[str, float] | None = None) -> float:
    """Mean over maximum of the hosts' loads, averaged over layers: 1 where all hosts of the table have equally much to do.

    Each expert's tokens are shared out between its replicas as evenly as the hosts' loads can be made, as routers do. With a
    cold tier it is that of the other hosts, or, if that is less, the least load the cold tier could have over what it has.

    Args:
        load: [L, E] load of each expert; a layer without any counts as one with equal loads.
        table: who holds what. A layer in which an expert with load is nowhere counts as 0.
        speeds: host -> how fast it computes compared with the others; 1 for one that is not named.
    """
    assert load.shape == (table.layers, table.experts), (load.shape, table.layers, table.experts)
    speed = np.asarray([1.0 if speeds is None else speeds.get(host, 1.0) for host in table.slots])
    cold = np.asarray([is_cold(host) for host in table.slots])
    found = []
    for index, measured in enumerate(load):
        held = np.zeros((len(table.slots), table.experts), dtype=np.bool_)
        slots = np.zeros(len(table.slots), dtype=np.int64)
        for h, layers in enumerate(table.slots.values()):
            slots[h] = len(layers[index])
            held[h, [expert for expert in layers[index] if expert != EMPTY]] = True
        found.append(tiered_balancedness(measured, held, slots, speed, cold))
    share, least = cold_shares(load, table)
    return min(float(np.mean(found)) if found else 1.0, least / share if share else 1.0)
