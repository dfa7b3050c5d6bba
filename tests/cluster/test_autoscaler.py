"""The autoscaler's written policy, sentence by sentence, and what must hold whatever a cluster does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.autoscaler import Autoscaler, Decision, Observation, hosts_needed, routers_needed
from moray.cluster.changes import Wanted
from moray.configs.autoscale import Autoscale, ExpertScaling, RouterScaling

EXPERTS = ExpertScaling(
    enabled=True, min_hosts=1, max_hosts=8, up_after_s=10, down_after_s=60, cooldown_s=30, rebalance_below=0.8
)
ROUTERS = RouterScaling(enabled=True, min_routers=1, max_routers=8, up_after_s=10, down_after_s=60, cooldown_s=30)

CALM = Observation(
    epoch=1,
    hosts=4,
    routers=2,
    utilisation=0.5,
    balance=0.95,
    tokens_per_expert=1e4,
    waiting=0,
    running=64,
    running_limit=128,
    kv_use=0.5,
)
"""Neither too busy nor too idle."""

QUIET = replace(CALM, running=4, kv_use=0.1)


def no_plan() -> float:
    raise AssertionError("nothing is planned")


def autoscaler(experts: ExpertScaling | None = None, routers: RouterScaling | None = None) -> Autoscaler:
    return Autoscaler(Autoscale(experts=experts or ExpertScaling(), routers=routers or RouterScaling()))


def first(
    scaler: Autoscaler,
    seen: Observation,
    seconds: Iterable[int] = range(1000),
    balance_after: Callable[[], float] = no_plan,
) -> tuple[int, Decision] | None:
    """The first decision, and when."""
    for now in seconds:
        decision = scaler.decide(seen, float(now), balance_after=balance_after)
        if decision is not None:
            return now, decision
    return None


def wanted(found: tuple[int, Decision] | None) -> tuple[int, Wanted]:
    assert found is not None
    return found[0], found[1].wanted


# ---- one sentence at a time ---------------------------------------------------------------------------------------------


def test_nothing_happens_unless_it_is_enabled() -> None:
    strained = replace(CALM, utilisation=1.0, balance=0.1, waiting=500, kv_use=1.0, hosts=100, routers=100)
    assert first(autoscaler(), strained) is None


def test_nothing_happens_to_a_calm_cluster() -> None:
    assert first(autoscaler(EXPERTS, ROUTERS), CALM) is None


@pytest.mark.parametrize(
    ("utilisation", "hosts"),
    [(0.81, 6), (0.9, 7), (1.0, 8)],  # middle between 0.3 and 0.8: 0.55
)
def test_busy_hosts_get_as_many_more_as_the_work_needs(utilisation: float, hosts: int) -> None:
    found = first(autoscaler(EXPERTS), replace(CALM, utilisation=utilisation))
    assert wanted(found) == (10, Wanted(experts=hosts))
    assert found is not None
    for part in ("4 expert hosts", f"{utilisation:.0%}", "over 80%", "10 s", f"{hosts} are needed"):
        assert part in found[1].reason


def test_not_beyond_the_ceiling() -> None:
    scaler = autoscaler(EXPERTS)
    assert wanted(first(scaler, replace(CALM, hosts=7, utilisation=1.0))) == (10, Wanted(experts=8))
    assert first(autoscaler(EXPERTS), replace(CALM, hosts=8, utilisation=1.0)) is None


def test_a_condition_must_hold_without_a_break() -> None:
    scaler = autoscaler(EXPERTS)
    busy = replace(CALM, utilisation=0.9)
    assert first(scaler, busy, range(9)) is None
    assert first(scaler, CALM, [9]) is None
    assert first(scaler, busy, range(10, 20)) is None
    assert wanted(first(scaler, busy, [20])) == (20, Wanted(experts=7))


def test_idle_hosts_leave_one_at_a_time() -> None:
    found = first(autoscaler(EXPERTS), replace(CALM, utilisation=0.02))
    assert wanted(found) == (60, Wanted(experts=3))
    assert found is not None
    assert "under 30% for 60 s: 3 will do" in found[1].reason


def test_a_host_stays_if_the_others_would_be_too_busy() -> None:
    # 2 x 0.29 = 0.58: more than the 0.55 that one host should have.
    assert first(autoscaler(EXPERTS), replace(CALM, hosts=2, utilisation=0.29)) is None
    assert wanted(first(autoscaler(EXPERTS), replace(CALM, hosts=2, utilisation=0.27))) == (60, Wanted(experts=1))


@pytest.mark.parametrize(("fewest", "min_hosts"), [(4, 1), (1, 4), (3, 4)])
def test_never_fewer_than_the_model_needs(fewest: int, min_hosts: int) -> None:
    scaler = autoscaler(EXPERTS.model_copy(update={"min_hosts": min_hosts}))
    assert first(scaler, replace(CALM, utilisation=0.0, fewest_hosts=fewest)) is None


@pytest.mark.parametrize(
    ("hosts", "fewest", "allowed"),
    [(1, 1, 3), (12, 1, 6), (2, 5, 5), (6, 9, 9), (12, 9, 9)],
    ids=["below the floor", "above the ceiling", "below what fits", "what fits beats the ceiling", "and no more"],
)
def test_a_number_outside_the_limits_is_brought_back_at_once(hosts: int, fewest: int, allowed: int) -> None:
    scaler = autoscaler(EXPERTS.model_copy(update={"min_hosts": 3, "max_hosts": 6}))
    found = first(scaler, replace(CALM, hosts=hosts, fewest_hosts=fewest))
    assert wanted(found) == (0, Wanted(experts=allowed))
    assert found is not None
    assert f"there are {hosts}" in found[1].reason


def test_an_uneven_load_is_balanced_if_that_wins_something() -> None:
    uneven = replace(CALM, balance=0.6)
    found = first(autoscaler(EXPERTS), uneven, balance_after=lambda: 0.9)
    assert wanted(found) == (10, Wanted(rebalance=True))
    assert found is not None
    assert "balance 0.60, under 0.80 for 10 s: 0.90 is possible" in found[1].reason


def test_nothing_moves_for_nothing_and_plans_are_not_made_all_the_time() -> None:
    planned: list[int] = []

    def balance_after() -> float:
        planned.append(1)
        return 0.62

    assert first(autoscaler(EXPERTS), replace(CALM, balance=0.6), range(100), balance_after) is None
    assert len(planned) == 3, "at 10, 40 and 70 s"


def test_a_balance_by_chance_is_not_believed() -> None:
    assert first(autoscaler(EXPERTS), replace(CALM, balance=0.1, tokens_per_expert=50.0)) is None


def test_rebalancing_can_be_turned_off() -> None:
    assert first(autoscaler(EXPERTS.model_copy(update={"rebalance_below": 0.0})), replace(CALM, balance=0.01)) is None


def test_waiting_requests_need_as_many_routers_again() -> None:
    found = first(autoscaler(routers=ROUTERS), replace(CALM, waiting=30))
    assert wanted(found) == (10, Wanted(routers=3)), "64 run on two, 94 will on three"
    assert found is not None
    assert "15.0 requests wait for each of 2 routers" in found[1].reason


def test_routers_are_at_most_doubled() -> None:
    assert wanted(first(autoscaler(routers=ROUTERS), replace(CALM, waiting=5000))) == (10, Wanted(routers=4))
    assert wanted(first(autoscaler(routers=ROUTERS), replace(CALM, routers=5, waiting=5000))) == (10, Wanted(routers=8))


def test_full_caches_need_routers() -> None:
    # Middle between 0.3 and 0.9: 0.6.
    assert wanted(first(autoscaler(routers=ROUTERS), replace(CALM, kv_use=0.95))) == (10, Wanted(routers=4))


def test_a_few_waiting_requests_change_nothing() -> None:
    assert first(autoscaler(routers=ROUTERS), replace(CALM, waiting=8)) is None
    assert first(autoscaler(routers=ROUTERS), replace(QUIET, waiting=1)) is None, "nor does a router leave then"


def test_a_quiet_router_leaves() -> None:
    assert wanted(first(autoscaler(routers=ROUTERS), QUIET)) == (60, Wanted(routers=1))
    assert first(autoscaler(routers=ROUTERS), replace(QUIET, routers=1)) is None


@pytest.mark.parametrize("full", [{"kv_use": 0.4}, {"running": 50}], ids=["pages", "running"])
def test_a_router_that_has_enough_to_do_stays(full: dict[str, Any]) -> None:
    assert first(autoscaler(routers=ROUTERS), replace(QUIET, **full)) is None


@pytest.mark.parametrize("full", [{"kv_use": 0.4}, {"running": 50}], ids=["pages", "running"])
def test_a_router_stays_if_the_others_would_be_too_full(full: dict[str, Any]) -> None:
    near = ROUTERS.model_copy(update={"low_kv_use": 0.5, "high_kv_use": 0.6})
    assert first(autoscaler(routers=near), replace(QUIET, **full)) is None
    three = replace(QUIET, routers=3, running_limit=192, **full)
    assert (first(autoscaler(routers=near), three) is None) == ("kv_use" in full), "2 x 0.6 and 2 x 0.2"


@pytest.mark.parametrize(("routers", "allowed"), [(1, 2), (5, 3)])
def test_routers_outside_the_limits(routers: int, allowed: int) -> None:
    scaler = autoscaler(routers=ROUTERS.model_copy(update={"min_routers": 2, "max_routers": 3}))
    assert wanted(first(scaler, replace(CALM, routers=routers))) == (0, Wanted(routers=allowed))


def test_one_thing_at_a_time() -> None:
    scaler = autoscaler(EXPERTS, ROUTERS)
    strained = replace(CALM, utilisation=0.81, waiting=50, balance=0.5)
    assert wanted(first(scaler, strained)) == (10, Wanted(experts=6))
    assert first(scaler, replace(strained, changing=True), range(11, 100)) is None
    # A cool-down after the end of the change, and all is measured anew after each.
    after = replace(strained, hosts=6, epoch=2)
    assert wanted(first(scaler, after, range(100, 500))) == (129, Wanted(routers=4))
    assert wanted(first(scaler, replace(after, routers=4), range(130, 500))) == (140, Wanted(experts=8))


@pytest.mark.parametrize(
    "change", [{"epoch": 2}, {"hosts": 5}, {"changing": True}], ids=["moved", "another host", "changing"]
)
def test_a_change_of_others_is_followed_by_a_cool_down(change: dict[str, Any]) -> None:
    scaler = autoscaler(EXPERTS)
    busy = replace(CALM, utilisation=0.81)
    assert first(scaler, busy, range(9)) is None
    changed = replace(busy, **change)
    assert first(scaler, changed, [9]) is None
    found = first(scaler, replace(changed, changing=False), range(10, 1000))
    assert found is not None
    assert found[0] == 9 + 30


def test_after_a_change_of_others_conditions_hold_anew() -> None:
    scaler = autoscaler(EXPERTS.model_copy(update={"cooldown_s": 0.0}))
    busy = replace(CALM, utilisation=0.81)
    assert first(scaler, busy, range(9)) is None
    assert wanted(first(scaler, replace(busy, epoch=2), range(9, 100))) == (19, Wanted(experts=6))


def test_a_decision_that_comes_to_nothing_is_tried_again_after_the_cool_down() -> None:
    scaler = autoscaler(EXPERTS)
    busy = replace(CALM, utilisation=0.81)
    times = [now for now in range(100) if scaler.decide(busy, float(now), balance_after=no_plan) is not None]
    assert times == [10, 40, 70]


def test_hosts_and_routers_rest_apart() -> None:
    scaler = autoscaler(EXPERTS, ROUTERS)
    assert wanted(first(scaler, replace(CALM, utilisation=0.81))) == (10, Wanted(experts=6))
    waiting = replace(CALM, hosts=6, epoch=2, waiting=30)
    assert wanted(first(scaler, waiting, range(11, 100))) == (21, Wanted(routers=3))


# ---- whatever the cluster does ------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn) -> Autoscale:
    low, high = sorted(draw(st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9))))
    least, most = sorted(draw(st.tuples(st.integers(1, 6), st.integers(1, 6))))
    times = {
        "up_after_s": draw(st.integers(0, 8)),
        "down_after_s": draw(st.integers(0, 8)),
        "cooldown_s": draw(st.integers(0, 8)),
    }
    return Autoscale(
        experts=ExpertScaling(
            enabled=True, min_hosts=least, max_hosts=most, low_utilisation=low, high_utilisation=high + 0.05, **times
        ),
        routers=RouterScaling(
            enabled=True,
            min_routers=least,
            max_routers=most,
            low_kv_use=low,
            high_kv_use=high + 0.05,
            waiting_per_router=draw(st.integers(0, 10)),
            **times,
        ),
    )


@dataclass
class Cluster:
    """As much of a cluster as the policy sees: work comes, and changes take some time."""

    hosts: int
    routers: int
    fewest_hosts: int
    change_s: int
    run_limit: int = 8
    pages: int = 16
    epoch: int = 1
    even: bool = True
    decisions: list[tuple[float, Observation, Wanted]] = field(default_factory=list)
    _pending: tuple[float, Wanted] | None = None

    def second(self, scaler: Autoscaler, now: float, work: float, requests: int) -> None:
        if self._pending is not None and now >= self._pending[0]:
            self._change(self._pending[1])
            self._pending = None
        seen = self.observe(work, requests)
        decision = scaler.decide(seen, now, balance_after=lambda: 0.99)
        if decision is not None:
            assert decision.reason
            self.decisions.append((now, seen, decision.wanted))
            self._pending = now + self.change_s, decision.wanted
            if not self.change_s:
                self._change(decision.wanted)
                self._pending = None

    def observe(self, work: float, requests: int) -> Observation:
        running = min(requests, self.run_limit * self.routers, self.pages * self.routers // 3)
        return Observation(
            epoch=self.epoch,
            hosts=self.hosts,
            routers=self.routers,
            utilisation=min(1.0, work / self.hosts),
            balance=1.0 if self.even else 0.2,
            tokens_per_expert=1e6,
            waiting=requests - running,
            running=running,
            running_limit=self.run_limit * self.routers,
            kv_use=3 * running / (self.pages * self.routers),
            fewest_hosts=self.fewest_hosts,
            changing=self._pending is not None,
        )

    def _change(self, wanted: Wanted) -> None:
        assert not wanted.drain
        assert not wanted.replicas
        if wanted.experts is not None or wanted.rebalance:
            self.epoch += 1
            self.even = True
        self.hosts = wanted.experts or self.hosts
        self.routers = wanted.routers or self.routers


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=policies(),
    hosts=st.integers(1, 9),
    routers=st.integers(1, 9),
    fewest=st.integers(1, 7),
    change_s=st.integers(0, 5),
    loads=st.lists(st.tuples(st.floats(0, 8), st.integers(0, 60), st.booleans()), min_size=1, max_size=12),
)
def test_limits_rests_and_steps(
    policy: Autoscale,
    hosts: int,
    routers: int,
    fewest: int,
    change_s: int,
    loads: list[tuple[float, int, bool]],
) -> None:
    scaler, cluster = Autoscaler(policy), Cluster(hosts, routers, fewest, change_s)
    for step, (work, requests, even) in enumerate(loads):
        cluster.even = even
        for second in range(10):
            cluster.second(scaler, float(10 * step + second), work, requests)
    floor = max(policy.experts.min_hosts, fewest)
    ceiling = max(policy.experts.max_hosts, floor)
    last: dict[bool, float] = {}
    ended = -1.0
    for now, seen, asked in cluster.decisions:
        of_routers = asked.routers is not None
        assert [asked.experts is not None, of_routers, asked.rebalance].count(True) == 1
        assert now >= ended, "one change at a time"
        rest = policy.routers.cooldown_s if of_routers else policy.experts.cooldown_s
        assert now >= last.get(of_routers, -1e9) + rest
        last[of_routers] = ended = now + change_s
        if asked.experts is not None:
            assert asked.experts != seen.hosts
            assert floor <= asked.experts <= ceiling
            assert asked.experts >= seen.hosts - 1 or seen.hosts > ceiling, "down one at a time"
        if asked.routers is not None:
            assert asked.routers != seen.routers
            assert policy.routers.min_routers <= asked.routers <= policy.routers.max_routers
            assert asked.routers >= seen.routers - 1 or seen.routers > policy.routers.max_routers
            assert asked.routers <= max(2 * seen.routers, policy.routers.min_routers)


def turns(numbers: list[int]) -> int:
    """How often a sequence changes its direction."""
    signs = [1 if b > a else -1 for a, b in itertools.pairwise(numbers) if a != b]
    return sum(a != b for a, b in itertools.pairwise(signs))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=policies(),
    hosts=st.integers(1, 9),
    routers=st.integers(1, 9),
    fewest=st.integers(1, 7),
    change_s=st.integers(0, 5),
    work=st.floats(0, 8),
    requests=st.integers(0, 24),
)
def test_constant_load_never_has_the_numbers_go_up_and_down(
    policy: Autoscale, hosts: int, routers: int, fewest: int, change_s: int, work: float, requests: int
) -> None:
    """Back within the limits, then in one direction, then nothing more."""
    scaler, cluster = Autoscaler(policy), Cluster(hosts, routers, fewest, change_s, even=False)
    for second in range(500):
        cluster.second(scaler, float(second), work, requests)
    decisions = cluster.decisions
    within = [
        (now, seen, asked)
        for now, seen, asked in decisions
        if max(policy.experts.min_hosts, fewest) <= seen.hosts <= max(policy.experts.max_hosts, fewest)
        and policy.routers.min_routers <= seen.routers <= policy.routers.max_routers
    ]
    assert turns([seen.hosts for _, seen, _ in within] + [cluster.hosts]) == 0
    assert turns([seen.routers for _, seen, _ in within] + [cluster.routers]) == 0
    assert not decisions or decisions[-1][0] < 400, "it comes to rest"
    assert sum(asked.rebalance for _, _, asked in decisions) <= 1


@given(hosts=st.integers(1, 20), utilisation=st.floats(0, 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_hosts_needed(hosts: int, utilisation: float) -> None:
    needed = hosts_needed(EXPERTS, hosts, utilisation)
    assert needed >= 1
    assert hosts * utilisation / needed <= 0.55 + 1e-6
    assert needed == 1 or hosts * utilisation / (needed - 1) > 0.55


@pytest.mark.parametrize(
    ("seen", "needed"),
    [
        (replace(CALM, kv_use=0.0, running=0), 1),
        (replace(CALM, kv_use=0.6, running=0), 2),
        (replace(CALM, kv_use=0.61, running=0), 3),
        (replace(CALM, kv_use=0.0, running=100), 3),
        (replace(CALM, kv_use=0.0, running=64, waiting=64), 4),
        (replace(CALM, kv_use=0.0, running=0, waiting=3), 8),
    ],
)
def test_routers_needed(seen: Observation, needed: int) -> None:
    assert routers_needed(ROUTERS, seen) == needed
