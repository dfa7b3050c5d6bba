"""When expert hosts and routers are added or removed and experts moved without anybody asking: a policy, and nothing else.

No clock, no I/O: the controller asks it about the running cluster, and a simulator can ask it about one that does not exist.
The policy in words is where its settings are, in `configs/deployment.py`. In all of it:

* a condition must hold in every observation for some time before anything follows from it;
* one thing changes at a time, and after a change, whoever asked for it, everything must hold anew, and a cool-down pass;
* more is added in proportion to what is missing, and taken away one at a time, and only if what is left would not be busier
  than the middle between the thresholds. So work that stays the same never has the number go up and down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..configs.autoscale import Autoscale, ExpertScaling, RouterScaling
from .changes import Wanted
from .layer_plan import MIN_GAIN

_TOKENS_TO_JUDGE = 100.0
"""Tokens an expert must have seen on average before a balance is believed: with fewer, chance alone makes hosts unequal.
With 100, an expert's count is off by a tenth, that of a host with 8 experts a layer by 4%: about the gain that moves need."""

_MOST_GROWTH = 2
"""Routers are at most doubled at once: how many the requests that wait will keep busy is a guess."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The cluster at one moment.

    Attributes:
        epoch: of the placement table.
        hosts: expert hosts in it, without those of the cold tier: how many these are is for people to say.
        routers: routers there are.
        utilisation: mean share of the time that the hosts compute.
        balance: mean over maximum of the hosts' measured loads; see `load_monitor.balance`.
        tokens_per_expert: routed tokens that `balance` rests on, for each expert of a layer on average.
        waiting: requests that wait at the routers, together.
        running: requests that run there, together.
        running_limit: requests that can run, together.
        kv_use: share of all KV pages that running requests hold.
        fewest_hosts: expert hosts without which the model does not fit, or copies would share a host.
        changing: something is being changed or restored.
    """

    epoch: int
    hosts: int
    routers: int
    utilisation: float
    balance: float
    tokens_per_expert: float
    waiting: int
    running: int
    running_limit: int
    kv_use: float
    fewest_hosts: int = 1
    changing: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now, and why, in words."""

    wanted: Wanted
    reason: str


class Autoscaler:
    """Decides one thing after another; remembers only since when conditions have held.

    Args:
        policy: the settings.
    """

    def __init__(self, policy: Autoscale) -> None:
        self._policy = policy
        self._busy, self._idle, self._uneven = _Held(), _Held(), _Held()
        self._queued, self._quiet = _Held(), _Held()
        self._placed: tuple[int, int] | None = None  # epoch and hosts at the last observation
        self._routed: int | None = None  # routers then
        self._experts_rest_until = self._routers_rest_until = self._plan_again_at = -math.inf

    def decide(self, seen: Observation, now: float, *, balance_after: Callable[[], float]) -> Decision | None:
        """What to do, if anything; to be asked every second or so.

        Args:
            seen: the cluster now.
            now: seconds, on any clock that does not go backwards.
            balance_after: the balance that a new plan would have. Called only where it decides: planning costs time.
        """
        self._note_changes(seen, now)
        if seen.changing:
            return None
        decision = self._experts(seen, now, balance_after) if self._policy.experts.enabled else None
        if decision is None and self._policy.routers.enabled:
            decision = self._routers(seen, now)
        if decision is not None:
            self._start_anew()
            if decision.wanted.routers is None:
                self._experts_rest_until = now + self._policy.experts.cooldown_s
            else:
                self._routers_rest_until = now + self._policy.routers.cooldown_s
        return decision

    def _note_changes(self, seen: Observation, now: float) -> None:
        """Rest after every change, also after those that others asked for."""
        placed = (seen.epoch, seen.hosts)
        moved = self._placed not in (None, placed)
        grown = self._routed not in (None, seen.routers)
        self._placed, self._routed = placed, seen.routers
        if moved or seen.changing:
            self._experts_rest_until = now + self._policy.experts.cooldown_s
        if grown or seen.changing:
            self._routers_rest_until = now + self._policy.routers.cooldown_s
        if moved or grown or seen.changing:
            self._start_anew()

    def _start_anew(self) -> None:
        for held in (self._busy, self._idle, self._uneven, self._queued, self._quiet):
            held.stop()

    # ---- expert hosts -----------------------------------------------------------------------------------------------

    def _experts(self, seen: Observation, now: float, balance_after: Callable[[], float]) -> Decision | None:
        policy, hosts = self._policy.experts, seen.hosts
        floor = max(policy.min_hosts, seen.fewest_hosts)
        ceiling = max(policy.max_hosts, floor)
        more = min(ceiling, hosts_needed(policy, hosts, seen.utilisation))
        busy_s = self._busy.seconds(seen.utilisation > policy.high_utilisation and more > hosts, now)
        spared = hosts > floor and hosts_needed(policy, hosts, seen.utilisation) < hosts
        idle_s = self._idle.seconds(seen.utilisation < policy.low_utilisation and spared, now)
        judged = seen.tokens_per_expert >= _TOKENS_TO_JUDGE
        uneven_s = self._uneven.seconds(judged and seen.balance < policy.rebalance_below, now)
        if now < self._experts_rest_until:
            return None
        if (allowed := min(max(hosts, floor), ceiling)) != hosts:
            limits = f"there may be {floor} to {ceiling} expert hosts, and there are {hosts}"
            return Decision(Wanted(experts=allowed), limits)
        if busy_s >= policy.up_after_s:
            return Decision(
                Wanted(experts=more),
                f"{hosts} expert hosts compute {seen.utilisation:.0%} of the time, over {policy.high_utilisation:.0%} "
                f"for {busy_s:.0f} s: {more} are needed",
            )
        if uneven_s >= policy.up_after_s and now >= self._plan_again_at:
            self._plan_again_at = now + policy.cooldown_s
            after = balance_after()
            if after >= seen.balance + MIN_GAIN:
                return Decision(
                    Wanted(rebalance=True),
                    f"balance {seen.balance:.2f}, under {policy.rebalance_below:.2f} for {uneven_s:.0f} s: "
                    f"{after:.2f} is possible",
                )
        if idle_s >= policy.down_after_s:
            return Decision(
                Wanted(experts=hosts - 1),
                f"{hosts} expert hosts compute {seen.utilisation:.0%} of the time, under {policy.low_utilisation:.0%} "
                f"for {idle_s:.0f} s: {hosts - 1} will do",
            )
        return None

    # ---- routers ----------------------------------------------------------------------------------------------------

    def _routers(self, seen: Observation, now: float) -> Decision | None:
        policy, routers = self._policy.routers, seen.routers
        queue = seen.waiting / max(1, routers)
        needed = routers_needed(policy, seen)
        more = min(policy.max_routers, needed, _MOST_GROWTH * routers)
        full = queue > policy.waiting_per_router or seen.kv_use > policy.high_kv_use
        queued_s = self._queued.seconds(full and more > routers, now)
        little = max(seen.kv_use, _running_use(seen)) < policy.low_kv_use and not seen.waiting
        quiet_s = self._quiet.seconds(little and needed < routers and routers > policy.min_routers, now)
        if now < self._routers_rest_until:
            return None
        if (allowed := min(max(routers, policy.min_routers), policy.max_routers)) != routers:
            limits = f"there may be {policy.min_routers} to {policy.max_routers} routers, and there are {routers}"
            return Decision(Wanted(routers=allowed), limits)
        if queued_s >= policy.up_after_s:
            return Decision(
                Wanted(routers=more),
                f"{queue:.1f} requests wait for each of {routers} routers and {seen.kv_use:.0%} of the KV pages are in use, "
                f"over {policy.waiting_per_router:g} or {policy.high_kv_use:.0%} for {queued_s:.0f} s: {more} are needed",
            )
        if quiet_s >= policy.down_after_s:
            return Decision(
                Wanted(routers=routers - 1),
                f"no request waits for one of {routers} routers and {seen.kv_use:.0%} of the KV pages are in use, under "
                f"{policy.low_kv_use:.0%} for {quiet_s:.0f} s: {routers - 1} will do",
            )
        return None


def hosts_needed(policy: ExpertScaling, hosts: int, utilisation: float) -> int:
    """Fewest expert hosts that the work of `hosts` hosts keeps no busier than the middle between the thresholds; at least 1."""
    return _needed(hosts * utilisation, (policy.high_utilisation + policy.low_utilisation) / 2)


def routers_needed(policy: RouterScaling, seen: Observation) -> int:
    """Fewest routers for the requests there are; at least 1.

    As long as requests wait, the routers run as many as they can: those that wait need as many routers again, in proportion.
    Where none waits, neither the KV pages nor the running requests may fill more than the middle between the thresholds.
    """
    middle = (policy.high_kv_use + policy.low_kv_use) / 2
    needed = _needed(seen.routers * seen.kv_use, middle)
    if seen.waiting:
        return max(needed, _needed(seen.routers * (1 + seen.waiting / max(1, seen.running)), 1.0))
    return max(needed, _needed(seen.routers * _running_use(seen), middle))


def _running_use(seen: Observation) -> float:
    return seen.running / max(1, seen.running_limit)


def _needed(work: float, each: float) -> int:
    """Into how many parts of at most `each` the work divides: at least 1. Rounding errors do not make another part."""
    return max(1, math.ceil(work / each - 1e-9))


class _Held:
    """Since when a condition has held."""

    def __init__(self) -> None:
        self._since: float | None = None

    def seconds(self, condition: bool, now: float) -> float:
        """How long it has held; -inf if it does not."""
        if not condition:
            self.stop()
            return -math.inf
        if self._since is None:
            self._since = now
        return now - self._since

    def stop(self) -> None:
        """It holds no longer, or is to hold anew."""
        self._since = None
