"""The autoscaler at work: the project's own policy, fed with what simulated processes report, and its decisions carried out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ...configs.errors import ConfigError
from ..assembly import host_name, router_name
from ..autoscaler import Autoscaler, Decision, Observation
from ..load_monitor import UtilisationMonitor, balance
from .batches import Batches, kv_use
from .cluster import Site
from .draws import ExpertDraws
from .events import VirtualTime
from .front import Front
from .machines import Machines
from .measure import Recorder
from .placing import Placing, some
from .routers import SimulatedRouter

_BALANCE_EVERY_S = 5.0
"""Between looks at the balance: as in `cluster/observer.py`."""


class Scaling:
    """What `cluster/observer.py` and `cluster/transition.py` do with the autoscaler.

    Args:
        site: as it was in the beginning.
        routers: by name; `new_router` adds to them.
        every: the batches of all routers there ever were.
        numbers: of hosts, as the machines know them.
        lost_routers: names of those that are being restored.
        seed: of what routers count.
    """

    def __init__(
        self,
        site: Site,
        clock: VirtualTime,
        machines: Machines,
        draws: ExpertDraws,
        placing: Placing,
        recorder: Recorder,
        front: Front,
        routers: dict[str, SimulatedRouter],
        every: Sequence[Batches],
        numbers: Mapping[str, int],
        lost_routers: Mapping[str, None],
        new_router: Callable[[str], None],
        *,
        seed: int,
    ) -> None:
        self._site, self._clock, self._machines, self._draws = site, clock, machines, draws
        self._placing, self._recorder, self._front = placing, recorder, front
        self._routers, self._every, self._numbers = routers, every, numbers
        self._lost_routers, self._new_router = lost_routers, new_router
        self._utilisation = UtilisationMonitor()
        self._autoscaler = Autoscaler(site.autoscale)
        self._generator = np.random.default_rng([seed, 3])
        self._expert_tokens = np.zeros((site.table.layers, site.table.experts), dtype=np.int64)
        self._routed = 0
        self._balance, self._balance_at = 1.0, 0.0

    def start(self) -> None:
        """Begin to listen to reports, where the autoscaler wants them."""
        if self._site.autoscale.experts.enabled or self._site.autoscale.routers.enabled:
            self._placing.monitor.observe("routers", self._expert_tokens, 0.0)
            self._clock.every(self._site.heartbeat_s, self._tick)

    # ---- reports ------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """A round of reports, and what follows of it."""
        now, placing = self._clock.now, self._placing
        self._count(now)
        for host in placing.table.slots:
            if host not in placing.down:
                self._utilisation.observe(host, self._machines.busy_s(self._numbers[host]), now)
        if now >= self._balance_at:
            self._balance_at = now + _BALANCE_EVERY_S
            self._balance = 1.0 if placing.load is None else balance(placing.load, placing.table)
        decision = self._autoscaler.decide(self._seen(), now, balance_after=self._balance_after)
        if decision is None:
            return
        self._recorder.happened("autoscale", f"epoch {placing.table.epoch}", decision.reason)
        try:
            self._act(decision)
        except ConfigError as error:
            self._recorder.happened("autoscale_failed", f"epoch {placing.table.epoch}", str(error))

    def _count(self, now: float) -> None:
        """Tokens that were routed to each expert since the last round, drawn from its share of them."""
        routed = sum(batches.routed_tokens for batches in self._every) * self._site.twins
        pairs, self._routed = (routed - self._routed) * self._site.config.num_experts_per_tok, routed
        if pairs:
            self._expert_tokens += self._generator.multinomial(pairs, self._draws.expected(now))
        self._placing.monitor.observe("routers", self._expert_tokens, now)

    def _seen(self) -> Observation:
        site, placing, twins = self._site, self._placing, self._site.twins
        batches = [router.batches for router in self._routers.values()]
        return Observation(
            epoch=placing.table.epoch,
            hosts=len(placing.table.slots),
            routers=(len(self._routers) + len(self._lost_routers)) * twins,
            utilisation=self._utilisation.mean(placing.table.slots),
            balance=self._balance,
            tokens_per_expert=placing.monitor.tokens / self._expert_tokens.size,
            waiting=sum(len(one.scheduler.waiting) for one in batches) * twins,
            running=sum(len(one.scheduler.running) for one in batches) * twins,
            running_limit=len(batches) * twins * site.settings.max_running,
            kv_use=kv_use(batches),
            fewest_hosts=site.min_replicas,
            changing=bool(placing.changing or placing.down or self._lost_routers),
        )

    def _balance_after(self) -> float:
        try:
            plan = self._placing.plan(list(self._placing.table.slots))
        except ConfigError:
            return 0.0
        return balance(self._placing.monitor.load, plan.table)

    # ---- decisions ----------------------------------------------------------------------------------------------------

    def _act(self, decision: Decision) -> None:
        """Carry a decision out.

        Raises:
            ConfigError: it cannot be.
        """
        if decision.wanted.routers is not None:
            self._change_routers(decision.wanted.routers)
        else:
            self._change_hosts(decision.wanted.experts)

    def _change_hosts(self, wanted: int | None) -> None:
        """Have so many hosts (None: as many as there are), and experts placed for the load that was measured."""
        placing, table = self._placing, self._placing.table
        hosts = _by_number(table.slots)
        count = len(hosts) if wanted is None else wanted
        unused = (name for index in itertools.count() if (name := host_name(index)) not in table.slots)
        added = list(itertools.islice(unused, max(0, count - len(hosts))))
        self._seat(added)
        try:
            plan = placing.plan(_by_number([*hosts[:count], *added]))
        except ConfigError:
            placing.vacate(added)
            raise

        def adopt() -> None:
            left = [host for host in table.slots if host not in plan.table.slots]
            placing.vacate(left)
            for host in left:
                self._utilisation.forget(host)
            placing.adopt(plan.table)

        seconds = placing.moves_s(plan) + (placing.start_s(len(added)) if added else 0.0)
        placing.begin_change(seconds, adopt, lambda: placing.vacate(added))

    def _change_routers(self, wanted: int) -> None:
        if self._site.twins > 1:
            raise ConfigError("each modelled router stands for several: their number cannot change")
        there, recovery = _by_number(self._routers), self._site.recovery
        for name in there[wanted:]:
            self._leave(self._routers[name])
        unused = (name for index in itertools.count() if (name := router_name(index)) not in self._routers)
        added = list(itertools.islice(unused, max(0, wanted - len(there))))
        if not added:
            return
        self._seat(added)

        def come() -> None:
            for name in added:
                self._new_router(name)
            self._recorder.happened("routers_added", some(added))
            self._front.router_came()

        seconds = recovery.start_s + recovery.router_bytes / recovery.disk
        self._placing.begin_change(seconds, come, lambda: self._placing.vacate(added))

    def _seat(self, names: list[str]) -> None:
        if not self._placing.seat(names):
            raise ConfigError(f"{some(names)}: there are too few free devices")

    def _leave(self, router: SimulatedRouter) -> None:
        """It gets nothing new, goes on with what it has for a while, and ends; what is left then goes on elsewhere."""
        router.leaving = True

        def end() -> None:
            if router.ended:
                return
            self._routers.pop(router.name, None)
            self._placing.vacate([router.name])
            self._front.move(router.end())
            self._recorder.happened("router_left", router.name)

        if router.batches.outstanding:
            router.left = end
            self._clock.after(self._site.recovery.drain_s, end)
        else:
            end()


def _by_number(names: Iterable[str]) -> list[str]:
    """Names such as `expert-host-10` in the order of their numbers."""
    return sorted(names, key=lambda name: int(name.rsplit("-", 1)[1]))
