"""What a simulation is watched for, and its result: plain numbers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .batches import Output, Request
from .draws import LayerDraw
from .events import VirtualTime

_LOOKED_BACK = 10_000
"""Gaps between tokens before a failure that tell what is usual."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of some times, in seconds; zeros where there were none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float] | array[float]) -> Percentiles:
        """Of these."""
        if not len(seconds):
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        values = np.asarray(seconds, dtype=np.float64)
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(len(values), float(values.mean()), p50, p90, p99, float(values.max()))


@dataclass(slots=True)
class Moment:
    """The cluster over one interval of the time line; rates are a second, of the whole cluster.

    Attributes:
        at: the interval's end.
        prompt_rate, output_rate: tokens of prompts whose first token came, and tokens generated.
        waiting, running: requests at its end.
        kv_use: share of the KV pages in use at its end.
        utilisation, busiest: share of the time that the hosts compute: their mean, and the busiest one's.
        balance: mean over maximum of the hosts' pairs in a layer, on average; 1 where nothing was computed.
        hosts, routers: that serve at its end.
        unreachable: (layer, expert) pairs that nobody can compute at its end.
    """

    at: float
    prompt_rate: float
    output_rate: float
    waiting: int
    running: int
    kv_use: float
    utilisation: float
    busiest: float
    balance: float
    hosts: int
    routers: int
    unreachable: int


@dataclass(slots=True)
class Happening:
    """Something that happened: a failure, what was done about it, a change."""

    at: float
    what: str
    subject: str
    detail: str = ""


@dataclass(slots=True)
class FailureEffect:
    """What one failure did.

    Attributes:
        at, target: of the failure.
        streams: requests that had begun to answer and had not ended.
        longest_gap_s, median_gap_s: between the last token before and the first one after it, of those that went on.
        usual_gap_s: the same at another moment before it: half of the time passes in gaps that are no longer.
        moved: requests that went on at another router.
        failed: requests that ended with an error since, until the next failure.
    """

    at: float
    target: str
    streams: int
    usual_gap_s: float
    longest_gap_s: float = 0.0
    median_gap_s: float = 0.0
    moved: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a simulation. Numbers are of the whole cluster, within the measured time, unless they say otherwise.

    Attributes:
        seconds: that were measured, after `warmup_s`.
        finished, failed, refused: requests; unfinished: at the end.
        prompt_tokens: of the requests whose first token came, those that came with their pages not counted.
        output_tokens: that reached clients.
        prompt_rate, output_rate: a second; per_gpu, per_node: prompt and output rate for each; zeros where there is no GPU.
        ttft, itl: of each request, and of each token after the first.
        queue_mean, queue_most: requests waiting.
        kv_mean, kv_most: share of the KV pages in use.
        balance: mean over maximum of the hosts' pairs in a layer of a step, in which chance makes hosts unequal as well.
        placement_balance: the same of the load in the long run, at the end.
        utilisation, busiest: share of the time that hosts compute: the mean, and the busiest one's.
        steps: of all modelled routers; preemptions: of sequences, whose pages ran out.
        resent: times that work of a lost host was asked of others.
        prefix_hit_tokens: of prompts, not computed because another request's pages held them.
        moments: the time line; happenings; failures.
    """

    seconds: float
    warmup_s: float
    finished: int
    failed: int
    refused: int
    unfinished: int
    prompt_tokens: int
    output_tokens: int
    prompt_rate: float
    output_rate: float
    per_gpu: tuple[float, float]
    per_node: tuple[float, float]
    ttft: Percentiles
    itl: Percentiles
    queue_mean: float
    queue_most: int
    kv_mean: float
    kv_most: float
    balance: float
    placement_balance: float
    utilisation: float
    busiest: float
    steps: int
    preemptions: int
    resent: int
    prefix_hit_tokens: int
    moments: tuple[Moment, ...] = field(repr=False)
    happenings: tuple[Happening, ...] = field(repr=False)
    failures: tuple[FailureEffect, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def _gap_at_any_moment(gaps: array[float]) -> float:
    """The gap that a moment falls into: the median of the gaps weighted by their lengths; 0 without any."""
    if not gaps:
        return 0.0
    ascending = np.sort(np.asarray(gaps))
    passed = np.cumsum(ascending)
    return float(ascending[np.searchsorted(passed, passed[-1] / 2)])


class Recorder:
    """Hears what happens to requests.

    Args:
        clock: of the simulation.
        twins: requests that each modelled one stands for.
        warmup_s: what happens before is not measured.

    Attributes:
        counts: within the measured time, each modelled request and token once.
    """

    def __init__(self, clock: VirtualTime, *, twins: int, warmup_s: float) -> None:
        self._clock = clock
        self.twins = twins
        self.warmup_s = warmup_s
        self.counts: Counter[str] = Counter()
        self.ttft: array[float] = array("d")
        self.itl: array[float] = array("d")
        self.happenings: list[Happening] = []
        self.failures: list[FailureEffect] = []
        self.open: dict[int, Request] = {}
        self._gaps: list[array[float]] = []
        self._balance = [0.0, 0.0]  # sum and weight within the measured time
        self._of_interval = {"balance": 0.0, "layers": 0.0, "prompt": 0.0, "output": 0.0}

    @property
    def measuring(self) -> bool:
        """Whether what happens now counts."""
        return self._clock.now >= self.warmup_s

    # ---- requests -----------------------------------------------------------------------------------------------------

    def answered(self, outputs: list[Output]) -> list[Request]:
        """Tokens have reached their clients; the requests that have ended with that."""
        now, measuring = self._clock.now, self.measuring
        last_failure = self.failures[-1].at if self.failures else -1.0
        ended = []
        for output in outputs:
            request = output.request
            if request.first_at is None or request.last_at is None:
                request.first_at = now
                own = request.arrival.prompt - request.arrival.cached
                self._of_interval["prompt"] += own
                if measuring:
                    self.ttft.append(now - request.at)
                    self.counts["prompt"] += own
            else:
                gap = now - request.last_at
                if measuring:
                    self.itl.append(gap)
                if request.last_at < last_failure:
                    self._over_failures(request.last_at, gap)
            request.last_at = now
            if output.reason is not None:
                ended.append(request)
                self.open.pop(request.number, None)
        self._of_interval["output"] += len(outputs)
        if measuring:
            self.counts["output"] += len(outputs)
            self.counts["finished"] += len(ended)
        return ended

    def ended_badly(self, requests: list[Request]) -> None:
        """Requests have ended with an error."""
        for request in requests:
            self.open.pop(request.number, None)
        if self.measuring:
            self.counts["failed"] += len(requests)
        if self.failures:
            self.failures[-1].failed += len(requests)

    def refused(self) -> None:
        """A request was turned away: all queues are full, or it is too long."""
        if self.measuring:
            self.counts["refused"] += 1

    def moved(self, requests: int) -> None:
        """Requests go on at another router."""
        if self.failures:
            self.failures[-1].moved += requests

    # ---- the cluster --------------------------------------------------------------------------------------------------

    def drew(self, draw: LayerDraw, layers: float) -> None:
        """A draw stands for so many layers."""
        self._of_interval["balance"] += layers * draw.balance
        self._of_interval["layers"] += layers
        if self.measuring:
            self._balance[0] += layers * draw.balance
            self._balance[1] += layers

    def asked_again(self) -> None:
        """Work of a lost host was asked of others."""
        self.counts["resent"] += 1

    def happened(self, what: str, subject: str, detail: str = "") -> None:
        """Note something for the report."""
        self.happenings.append(Happening(self._clock.now, what, subject, detail))

    def failed_now(self, target: str) -> None:
        """Something ends now, and its effect is to be watched."""
        streams = sum(request.first_at is not None for request in self.open.values())
        usual = _gap_at_any_moment(self.itl[-_LOOKED_BACK:])
        self.failures.append(FailureEffect(self._clock.now, target, streams, usual))
        self._gaps.append(array("d"))
        self.happened("failed", target)

    def take_interval(self) -> dict[str, float]:
        """What the interval summed up to, and begin the next one."""
        taken = dict(self._of_interval)
        self._of_interval = dict.fromkeys(taken, 0.0)
        return taken

    @property
    def balance(self) -> float:
        """Mean over the measured time."""
        return self._balance[0] / self._balance[1] if self._balance[1] else 1.0

    def effects(self) -> tuple[FailureEffect, ...]:
        """What each failure did."""
        for effect, gaps in zip(self.failures, self._gaps, strict=True):
            found = Percentiles.of(gaps)
            effect.median_gap_s, effect.longest_gap_s = found.p50, found.longest
            effect.streams *= self.twins
            effect.moved *= self.twins
            effect.failed *= self.twins
        return tuple(self.failures)

    def _over_failures(self, before: float, gap: float) -> None:
        for effect, gaps in zip(self.failures, self._gaps, strict=True):
            if before < effect.at:
                gaps.append(gap)
