"""Prometheus metrics of one front, and the routers' counters as seen from it.

Each app has a registry of its own, so that several can live in one process. Series carry the label `front`: behind a
load balancer each scrape reaches one replica, and without it their counters would mix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..messages import ClusterStatus, Event, Health, ProcessState, RouterStats
from .health import is_healthy, late_hosts

_TTFT_BUCKETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300)
_ITL_BUCKETS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 15)
_DURATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
"""Seconds. Chosen around R1's decode steps of 20 to 100 ms and answers of some thousand tokens."""

_COUNTERS = {
    "steps": "Steps the router has run.",
    "prompt_tokens": "Prompt tokens the router has computed.",
    "generated_tokens": "Tokens the router has generated.",
    "prefix_hit_tokens": "Prompt tokens that were not computed, because KV pages held them.",
    "drafted_tokens": "Tokens the MTP layer has drafted and the router has verified.",
    "accepted_tokens": "Drafted tokens that were right.",
    "preemptions": "Requests that had to give up their pages and start over.",
    "preempted_tokens": "Tokens of these that pages of other requests do not keep: they may have to be computed again.",
    "requests_finished": "Requests that ended by themselves.",
    "requests_cancelled": "Requests their clients gave up.",
    "requests_failed": "Requests that ended with an error.",
    "requests_refused": "Requests that were turned away because too many were waiting, or that waited for too long.",
    "resent_shares": "Shares of a layer's work that went to another replica because their host was lost.",
    "hedged_shares": "Shares of a layer's work that went to another replica too because their host was late.",
    "fenced_hosts": "Expert hosts the router has cut off because they stayed silent.",
}

_GAUGES = {
    "running": "Requests in the router's batch.",
    "waiting": "Requests in the router's queue.",
    "pages_total": "KV pages of the router.",
    "pages_free": "KV pages that hold nothing.",
    "pages_cached": "KV pages that hold prefixes no running request uses.",
    "pages_in_use": "KV pages of running requests.",
    "prefix_hit_rate": "Share of the prompt tokens so far that were not computed, because KV pages held them.",
    "unreachable_experts": "(layer, expert) pairs the router cannot reach.",
}


class FrontMetrics:
    """The counters of one front."""

    def __init__(self, front_id: str) -> None:
        self.registry = CollectorRegistry()
        self._front = front_id

        def label(*names: str) -> tuple[str, ...]:
            return ("front", *names)

        self._requests = Counter(
            "moray_http_requests",
            "Answered HTTP requests; 499 where the client hung up first.",
            label("endpoint", "status"),
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "moray_http_requests_in_flight", "HTTP requests being answered.", label("endpoint"), registry=self.registry
        )
        self._duration = Histogram(
            "moray_http_request_duration_seconds",
            "From a request's first byte to its answer's last.",
            label("endpoint"),
            buckets=_DURATION_BUCKETS,
            registry=self.registry,
        )
        generations = Counter(
            "moray_generations",
            "Prompts by how their generation ended: stop, length, cancelled or error.",
            label("reason"),
            registry=self.registry,
        )
        # Bound to their labels here: they begin at 0, and counting a token costs no lookup.
        self._generations = {
            reason: generations.labels(front_id, reason) for reason in ("stop", "length", "cancelled", "error")
        }
        self._prompt_tokens = Counter(
            "moray_prompt_tokens", "Tokens of prompts that ended.", label(), registry=self.registry
        ).labels(front_id)
        self._completion_tokens = 0
        self._resubmitted = Counter(
            "moray_requests_resubmitted",
            "Requests that went on at another router because their own was lost.",
            label(),
            registry=self.registry,
        ).labels(front_id)
        self._resubmitted_before = 0
        self._ttft = _Times(
            "moray_time_to_first_token_seconds",
            "From handing a prompt to the engine to its first token.",
            _TTFT_BUCKETS,
        )
        self._itl = _Times("moray_inter_token_latency_seconds", "Between a token and the one before it.", _ITL_BUCKETS)
        self.registry.register(_TokenCollector(self._token_families))

    def on_request_start(self, endpoint: str) -> None:
        """A request arrived."""
        self._in_flight.labels(self._front, endpoint).inc()

    def on_request_end(self, endpoint: str, status: int, duration_s: float) -> None:
        """A request was answered, or its client is gone."""
        self._in_flight.labels(self._front, endpoint).dec()
        self._requests.labels(self._front, endpoint, str(status)).inc()
        self._duration.labels(self._front, endpoint).observe(duration_s)

    def on_tokens(self, count: int, *, waited_s: float, first: bool) -> None:
        """See `TokenObserver`. Tokens that came together share the wait."""
        self._completion_tokens += count
        if first:
            self._ttft.observe(waited_s, 1)
        else:
            self._itl.observe(waited_s / count, count)

    def _token_families(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("moray_completion_tokens", "Tokens generated for clients.", labels=["front"])
        tokens.add_metric([self._front], self._completion_tokens)
        yield tokens
        yield self._ttft.family(self._front)
        yield self._itl.family(self._front)

    def on_end(self, reason: str, *, prompt_tokens: int) -> None:
        """See `TokenObserver`."""
        self._generations[reason].inc()
        self._prompt_tokens.inc(prompt_tokens)

    def exposition(self, status: ClusterStatus | None, *, resubmitted: int) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            status: None means that the cluster's state is not known now.
            resubmitted: see `EngineClient.resubmitted`.
        """
        self._resubmitted.inc(resubmitted - self._resubmitted_before)
        self._resubmitted_before = resubmitted
        cluster = CollectorRegistry()
        cluster.register(_ClusterCollector(status))
        return generate_latest(self.registry) + generate_latest(cluster)


class _Times:
    """A histogram that is told something for every token of every stream. The library's own takes a lock, and looks at its
    buckets one by one.

    Args:
        name, text: of the series.
        bounds: upper ends of the buckets, in seconds; the last bucket has none.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int) -> None:
        """It took so long, so many times."""
        self._counts[bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def family(self, front: str) -> Metric:
        """What has been observed, under this front's label."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text, labels=["front"])
        family.add_metric([front], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        return family


@dataclass(frozen=True, eq=False)
class _TokenCollector(Collector):
    """Families that are made when they are asked for."""

    families: Callable[[], Iterator[Metric]]

    def collect(self) -> Iterator[Metric]:
        return self.families()


@dataclass(frozen=True, eq=False)
class _ClusterCollector(Collector):
    """The cluster's state at one scrape. Router series have no `front` label: every front reports the same ones."""

    status: ClusterStatus | None

    def collect(self) -> Iterator[Metric]:
        status = self.status
        yield GaugeMetricFamily(
            "moray_cluster_healthy", "1 while every expert is reachable.", value=float(is_healthy(status))
        )
        if status is None:
            return
        health = GaugeMetricFamily(
            "moray_cluster_health", "1 for the cluster's present health, 0 for the others.", labels=["health"]
        )
        for each in get_args(Health):
            health.add_metric([each], float(each == status.health))
        yield health
        yield GaugeMetricFamily(
            "moray_late_hosts",
            "Expert hosts that owe some router an answer for longer than is usual for them.",
            value=len(late_hosts(status)),
        )
        yield from self._router_families(status.routers)
        yield GaugeMetricFamily(
            "moray_controller_answers",
            "1 while the controller answers; what only it knows is left out while it does not.",
            value=float(status.epoch > 0),
        )
        if status.epoch:
            yield from self._controller_families(status)

    def _controller_families(self, status: ClusterStatus) -> Iterator[Metric]:
        yield GaugeMetricFamily("moray_placement_epoch", "Epoch of the placement table.", value=status.epoch)
        yield GaugeMetricFamily(
            "moray_placement_balance",
            "Mean over maximum of the expert hosts' measured loads, averaged over layers; 1 before any was measured.",
            value=status.balance,
        )
        yield GaugeMetricFamily(
            "moray_missing_replicas",
            "(layer, expert) pairs that have fewer live replicas than min_replicas.",
            value=status.missing_replicas,
        )
        processes = GaugeMetricFamily("moray_processes", "Processes by role and state.", labels=["role", "state"])
        for role in ("expert_host", "router", "controller"):
            for state in get_args(ProcessState):
                count = sum((process.role, process.state) == (role, state) for process in status.processes)
                processes.add_metric([role, state], count)
        yield processes
        # The list is of the last events alone, so that counts of it would go down again: their times cannot mislead.
        newest: dict[str, Event] = {event.what: event for event in sorted(status.events, key=lambda event: event.at)}
        ended = GaugeMetricFamily(
            "moray_last_event_timestamp_seconds",
            "When the newest event of its kind among the cluster's last ones was over, in Unix time.",
            labels=["what"],
        )
        took = GaugeMetricFamily(
            "moray_last_event_duration_seconds",
            "How long the newest event of its kind among the cluster's last ones took.",
            labels=["what"],
        )
        for what, event in sorted(newest.items()):
            ended.add_metric([what], event.at)
            took.add_metric([what], event.seconds)
        yield ended
        yield took

    def _router_families(self, routers: list[RouterStats]) -> Iterator[Metric]:
        families: list[tuple[str, CounterMetricFamily | GaugeMetricFamily]] = [
            (name, CounterMetricFamily(f"moray_router_{name}", text, labels=["router"]))
            for name, text in _COUNTERS.items()
        ]
        families += [
            (name, GaugeMetricFamily(f"moray_router_{name}", text, labels=["router"])) for name, text in _GAUGES.items()
        ]
        for name, family in families:
            for router in routers:
                family.add_metric([router.router_id], getattr(router, name))
            yield family
        broken = GaugeMetricFamily("moray_router_broken_links", "Links that do not work now.", labels=["router"])
        for router in routers:
            broken.add_metric([router.router_id], len(router.broken_links))
        yield broken
