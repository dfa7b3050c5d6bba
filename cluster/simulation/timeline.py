"""Looks at the simulated cluster again and again, for the time line and the means of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .batches import Batches, kv_use
from .draws import ExpertDraws
from .events import VirtualTime
from .front import Taker
from .measure import Moment, Recorder


@dataclass(slots=True)
class Means:
    """Over the measured part of the time line.

    Attributes:
        queue_mean, queue_most: requests waiting; kv_mean, kv_most: share of the KV pages in use.
        utilisation, busiest: see `Moment`.
    """

    queue_mean: float = 0.0
    queue_most: int = 0
    kv_mean: float = 0.0
    kv_most: float = 0.0
    utilisation: float = 0.0
    busiest: float = 0.0


class Timeline:
    """One `Moment` after the other.

    Args:
        takers: routers, or ranks.
        draws: has the placement.
        numbers: of hosts.
        busy_s: seconds that a host has computed, by its number.
        hosts_up: how many hosts serve.
    """

    def __init__(
        self,
        clock: VirtualTime,
        takers: Mapping[str, Taker],
        draws: ExpertDraws,
        recorder: Recorder,
        numbers: Mapping[str, int],
        busy_s: Callable[[int], float],
        hosts_up: Callable[[], int],
    ) -> None:
        self._clock, self._takers, self._draws, self._recorder = clock, takers, draws, recorder
        self._numbers, self._busy_s, self._hosts_up = numbers, busy_s, hosts_up
        self._busy = dict.fromkeys(draws.table.slots, 0.0)
        self._since = 0.0
        self.moments: list[Moment] = []

    def look(self) -> None:
        """End an interval."""
        now, twins = self._clock.now, self._recorder.twins
        passed = now - self._since
        if passed <= 0:
            return
        self._since = now
        batches: list[Batches] = [taker.batches for taker in self._takers.values()]
        shares = list(self._host_shares(passed))
        sums = self._recorder.take_interval()
        self.moments.append(
            Moment(
                at=now,
                prompt_rate=sums["prompt"] * twins / passed,
                output_rate=sums["output"] * twins / passed,
                waiting=sum(len(one.scheduler.waiting) for one in batches) * twins,
                running=sum(len(one.scheduler.running) for one in batches) * twins,
                kv_use=kv_use(batches),
                utilisation=sum(shares) / len(shares) if shares else 0.0,
                busiest=max(shares, default=0.0),
                balance=sums["balance"] / sums["layers"] if sums["layers"] else 1.0,
                hosts=self._hosts_up(),
                routers=len(self._takers) * twins,
                unreachable=self._draws.unreachable,
            )
        )

    def means(self) -> Means:
        """Over the intervals that end after the warm-up."""
        seen = [moment for moment in self.moments if moment.at > self._recorder.warmup_s]
        if not seen:
            return Means()
        count = len(seen)
        return Means(
            queue_mean=sum(moment.waiting for moment in seen) / count,
            queue_most=max(moment.waiting for moment in seen),
            kv_mean=sum(moment.kv_use for moment in seen) / count,
            kv_most=max(moment.kv_use for moment in seen),
            utilisation=sum(moment.utilisation for moment in seen) / count,
            busiest=sum(moment.busiest for moment in seen) / count,
        )

    def _host_shares(self, passed: float) -> list[float]:
        """Share of the interval that each host computed."""
        before, self._busy = self._busy, {host: self._busy_s(self._numbers[host]) for host in self._draws.table.slots}
        return [max(0.0, busy - before.get(host, busy)) / passed for host, busy in self._busy.items()]
