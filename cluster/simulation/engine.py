"""The simulation: builds the modelled cluster, lets virtual time run, and says what came of it.

What decides is the project's own: `actors/scheduler.py` and `model/pages.py` in every router, `actors/replica_choice.py` and
`actors/routes.py` for every draw of a layer, `cluster/placement.py`, `cluster/load_monitor.py` and `cluster/autoscaler.py` for
what changes. What takes time is modelled: `costs.py` says how long each piece of work takes where nothing is in its way, and
`machines.py` what is in its way. Two runs with the same arguments give the same result to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ...configs.errors import ConfigError
from ...model.config import ModelConfig
from ..load_monitor import balance
from .batches import Batches
from .cluster import Site, slots_of
from .draws import ExpertDraws
from .events import VirtualTime
from .failing import Failure, Failures
from .front import Front, Taker
from .lockstep import Lockstep, Rank
from .machines import Machines, OwnDevices, SharedCores
from .measure import Percentiles, Recorder, Result
from .placing import Placing
from .routers import Engine, SimulatedRouter
from .scaling import Scaling
from .skew import UNIFORM, ExpertPopularity, Skew
from .timeline import Timeline
from .trace import Trace

_MOMENTS = 100
"""Intervals of a time line where the duration is known."""

_MOMENT_S = 1.0
"""Length of one where it is not."""

Progress = Callable[[float], None]
"""Told now and then how much virtual time has passed."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to simulate.

    Attributes:
        duration_s: virtual seconds; None: until every request has ended, for traces that end.
        warmup_s: of these, so many at first are not measured.
        skew: of the experts' load.
        blocks: layers that are drawn for a step, each of which stands for as many others; at most as many as there are.
        failures: what fails.
        seed: of everything that is drawn.
        moment_s: length of an interval of the time line; None for a hundredth of the duration.
    """

    duration_s: float | None = None
    warmup_s: float = 0.0
    skew: Skew = UNIFORM
    blocks: int = 4
    failures: tuple[Failure, ...] = ()
    seed: int = 0
    moment_s: float | None = None


def popularity(config: ModelConfig, options: Options) -> ExpertPopularity:
    """The experts' shares of the load, as the simulation draws from them: a placement can be planned for it."""
    return ExpertPopularity(
        options.skew,
        len(config.moe_layers),
        config.n_routed_experts,
        config.num_experts_per_tok,
        seed=options.seed,
    )


def simulate(site: Site, trace: Trace, options: Options, *, progress: Progress | None = None) -> Result:
    """Simulate a cluster under a trace.

    Args:
        progress: called once for each interval of the time line, with the virtual time that has passed.

    Raises:
        ConfigError: the site, the trace and the options contradict each other.
    """
    _check(site, trace, options)
    run = _Run(site, trace.shared_by(site.twins), options)
    if site.lockstep:
        run.lockstep()
    else:
        run.apart()
    return run.result(progress)


class _Run:
    """One simulation: `apart` or `lockstep`, then `result`."""

    def __init__(self, site: Site, trace: Trace, options: Options) -> None:
        self._site, self._options = site, options
        self._clock = clock = VirtualTime()
        self._recorder = Recorder(clock, twins=site.twins, warmup_s=options.warmup_s)
        self._end = math.inf if options.duration_s is None else options.duration_s
        self._routers: dict[str, SimulatedRouter] = {}
        self._ranks: dict[str, Rank] = {}
        self._takers: Mapping[str, Taker] = self._ranks if site.lockstep else self._routers
        self._every: list[Batches] = []
        self._numbers: dict[str, int] = {}
        self._draws = ExpertDraws(
            site.table,
            self._numbers,
            popularity=popularity(site.config, options),
            costs=site.costs,
            wire=site.wire,
            choice=site.choice,
            top_k=site.config.num_experts_per_tok,
            routers=len(site.routers) * site.twins if site.lockstep else 1,
            seed=options.seed,
        )
        cores, hosts = site.costs.cores, len(site.table.slots)
        machines: Machines = (
            OwnDevices(clock, hosts, times=site.twins)
            if cores is None
            else SharedCores(clock, hosts, cores, site.costs.crowded)
        )
        self._front = Front(
            clock,
            self._takers,
            machines,
            site.costs,
            trace,
            self._recorder,
            restore_timeout_s=site.settings.restore_timeout_s,
            until=self._end,
        )
        self._engine = Engine(
            clock=clock,
            machines=machines,
            draws=self._draws,
            costs=site.costs,
            audience=self._front,
            moe_layers=len(site.config.moe_layers),
            dense_layers=site.config.first_k_dense_replace,
            blocks=min(options.blocks, len(site.config.moe_layers)),
        )
        self._timeline: Timeline | None = None

    def apart(self) -> None:
        """Set up routers and hosts by themselves."""
        site, clock, machines = self._site, self._clock, self._engine.machines

        def new_router(name: str) -> None:
            router = SimulatedRouter(name, site.settings, self._engine)
            self._every.append(router.batches)
            self._routers[name] = router

        for name in site.routers:
            new_router(name)

        def experts_back() -> None:
            for router in list(self._routers.values()):
                router.experts_back()

        recorder, front, routers, numbers = self._recorder, self._front, self._routers, self._numbers
        placing = Placing(site, clock, machines, self._draws, recorder, numbers, experts_back)
        failures = Failures(site, clock, machines, placing, recorder, front, routers, numbers, new_router)
        for failure in self._options.failures:
            failures.targets(failure)  # refuses what cannot be
            clock.at(failure.at, partial(failures.fail, failure))
        Scaling(
            site,
            clock,
            machines,
            self._draws,
            placing,
            recorder,
            front,
            routers,
            self._every,
            numbers,
            failures.lost_routers,
            new_router,
            seed=self._options.seed,
        ).start()
        self._look(machines.busy_s, lambda: placing.hosts_up)

    def lockstep(self) -> None:
        """Set up GPUs that are router and host at once."""
        site, hosts = self._site, len(self._site.table.slots)
        group = Lockstep(site.routers, hosts, site.twins, site.settings, self._engine)
        self._ranks.update(group.ranks)
        self._every += [rank.batches for rank in group.ranks.values()]
        for failure in self._options.failures:
            if failure.target not in {*site.table.slots, *site.routers, *site.nodes.values()}:
                raise ConfigError(f"--fail {failure.target}: no such process or node")
            self._clock.at(failure.at, partial(self._group_fails, group, failure))
        self._look(lambda host: float(group.busy[host]), lambda: hosts)

    def _group_fails(self, group: Lockstep, failure: Failure) -> None:
        site, recovery = self._site, self._site.recovery
        self._recorder.failed_now(failure.target)
        most = max(slots_of(site.table, host) for host in site.table.slots)
        on_node = max(1, len(site.table.slots) // site.machines)
        read = on_node * (most * recovery.expert_bytes + recovery.router_bytes)
        seconds = recovery.node_given_up_s + recovery.start_s + read / recovery.disk
        self._recorder.happened("restarting", "all ranks", f"will take {seconds:.1f} s")
        self._front.move(group.lose_all(seconds))

    def _look(self, busy_s: Callable[[int], float], hosts_up: Callable[[], int]) -> None:
        self._timeline = Timeline(
            self._clock, self._takers, self._draws, self._recorder, self._numbers, busy_s, hosts_up
        )

    def result(self, progress: Progress | None) -> Result:
        """Let time run, and sum up."""
        options, timeline, clock = self._options, self._timeline, self._clock
        assert timeline is not None, "set up first"
        every_s = options.moment_s or (_MOMENT_S if self._end == math.inf else self._end / _MOMENTS)

        def look(number: int = 1) -> None:
            timeline.look()
            if progress is not None:
                progress(clock.now)
            clock.at(max(clock.now, (number + 1) * every_s), partial(look, number + 1))

        clock.at(every_s, look)
        self._front.start()
        clock.run(self._end)
        timeline.look()
        for batches in self._every:
            batches.check()
        return self._sum_up(timeline)

    def _sum_up(self, timeline: Timeline) -> Result:
        site, recorder, options = self._site, self._recorder, self._options
        twins, counts, means = site.twins, recorder.counts, timeline.means()
        seconds = self._clock.now - options.warmup_s
        prompt, output = counts["prompt"] * twins, counts["output"] * twins
        prompt_rate, output_rate = (tokens / seconds if seconds > 0 else 0.0 for tokens in (prompt, output))
        return Result(
            seconds=max(0.0, seconds),
            warmup_s=options.warmup_s,
            finished=counts["finished"] * twins,
            failed=counts["failed"] * twins,
            refused=counts["refused"] * twins,
            unfinished=len(recorder.open) * twins,
            prompt_tokens=prompt,
            output_tokens=output,
            prompt_rate=prompt_rate,
            output_rate=output_rate,
            per_gpu=(prompt_rate / site.gpus, output_rate / site.gpus) if site.gpus else (0.0, 0.0),
            per_node=(prompt_rate / site.machines, output_rate / site.machines),
            ttft=Percentiles.of(recorder.ttft),
            itl=Percentiles.of(recorder.itl),
            queue_mean=means.queue_mean,
            queue_most=means.queue_most,
            kv_mean=means.kv_mean,
            kv_most=means.kv_most,
            balance=recorder.balance,
            placement_balance=balance(self._draws.expected(self._clock.now), self._draws.table),
            utilisation=means.utilisation,
            busiest=means.busiest,
            steps=sum(batches.steps for batches in self._every),
            preemptions=sum(batches.scheduler.preemptions for batches in self._every) * twins,
            resent=counts["resent"],
            prefix_hit_tokens=sum(batches.scheduler.prefix_hit_tokens for batches in self._every) * twins,
            moments=tuple(timeline.moments),
            happenings=tuple(recorder.happenings),
            failures=recorder.effects(),
        )


def _check(site: Site, trace: Trace, options: Options) -> None:
    """Refuse what cannot be simulated."""
    if site.lockstep and site.costs.cores is not None:
        raise ConfigError("lockstep is for GPUs: processes that share cores take turns")
    if site.twins > 1 and site.costs.cores is not None:
        raise ConfigError("processes that share cores are modelled one by one: there can be no twins")
    if site.twins > 1 and any(failure.target in site.routers for failure in options.failures):
        raise ConfigError(
            f"each modelled router stands for {site.twins}: none can fail by itself; model more of them one by one"
        )
    if options.duration_s is not None and options.warmup_s >= options.duration_s:
        raise ConfigError(f"a warm-up of {options.warmup_s:g} s leaves nothing of {options.duration_s:g} s to measure")
    late = [failure for failure in options.failures if failure.at >= (options.duration_s or math.inf)]
    if late:
        raise ConfigError(f"--fail {late[0].at:g}:{late[0].target}: comes after the end, at {options.duration_s:g} s")
    if options.duration_s is None and trace.endless:
        raise ConfigError(f"{trace}: goes on for ever; say for how long to simulate it")
    capacity = site.settings.pages * site.settings.page_size
    if site.settings.max_context > capacity:
        raise ConfigError(f"max_context = {site.settings.max_context}: the KV pages of a router hold {capacity} tokens")
    if options.blocks < 1:
        raise ConfigError(f"blocks = {options.blocks}: must be at least 1")
