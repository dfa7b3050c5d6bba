"""What `moray chaos` does and in which order: determined by its seed, and never so much that no answer is possible."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.chaos.faults import fault_of
from moray.cluster.chaos.schedule import (
    KINDS,
    PAUSE_S,
    STAGGER_S,
    Event,
    Round,
    Shape,
    check_kinds,
    may_coincide,
    rounds,
)
from moray.cluster.chaos.target import Process, Target, View, not_whole
from moray.configs.errors import ClusterError, ConfigError

ALL = tuple(KINDS)
SHAPES = st.builds(Shape, hosts=st.integers(1, 6), routers=st.integers(1, 3), min_replicas=st.integers(1, 3))


def first(count: int, seed: int, shape: Shape, kinds: tuple[str, ...] = ALL) -> list[Round]:
    return list(itertools.islice(rounds(seed, kinds, shape), count))


@given(seed=st.integers(0, 1 << 40), shape=SHAPES)
@settings(max_examples=50, deadline=None)
def test_a_seed_determines_everything(seed: int, shape: Shape) -> None:
    assert first(30, seed, shape) == first(30, seed, shape)
    assert first(30, seed, shape) != first(30, seed + 1, shape)


@given(seed=st.integers(0, 1 << 40), shape=SHAPES)
@settings(max_examples=100, deadline=None)
def test_something_is_left_to_answer(seed: int, shape: Shape) -> None:
    for planned in first(40, seed, shape):
        kinds = [KINDS[event.kind] for event in planned.events]
        hosts, routers, controllers = (
            sum(kind.takes and kind.role == role for kind in kinds) for role in ("expert_host", "router", "controller")
        )
        assert hosts <= max(1, min(shape.min_replicas, shape.hosts) - 1)
        assert routers <= max(1, shape.routers - 1)
        if hosts >= min(shape.min_replicas, shape.hosts) or routers >= shape.routers:
            assert not controllers, "who restores what an answer needs must be there"
        assert sum(kind.role == "cluster" for kind in kinds) <= 1
        assert PAUSE_S[0] <= planned.pause_s <= PAUSE_S[1]
        assert STAGGER_S[0] <= planned.stagger_s <= STAGGER_S[1]
        for event, kind in zip(planned.events, kinds, strict=True):
            if kind.lasts_s is None:
                assert event.seconds == 0
            else:
                assert kind.lasts_s[0] <= event.seconds <= kind.lasts_s[1]


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_before_one_comes_twice(seed: int) -> None:
    shape = Shape(hosts=3, routers=2, min_replicas=2)
    events = [event.kind for planned in first(2 * len(ALL), seed, shape) for event in planned.events]
    # One may be put off by a round, when it did not go with the one before.
    assert set(events[: len(ALL) + 1]) == set(ALL)


def test_pairs_come_now_and_then() -> None:
    shape = Shape(hosts=3, routers=2, min_replicas=2)
    sizes = [len(planned.events) for seed in range(20) for planned in first(20, seed, shape)]
    assert 0.05 < sizes.count(2) / len(sizes) < 0.4
    pairs = {
        frozenset(event.kind for event in planned.events)
        for seed in range(100)
        for planned in first(20, seed, shape)
        if len(planned.events) == 2
    }
    assert frozenset(("kill-host", "kill-router")) in pairs
    assert frozenset(("stop-host", "scale-experts")) in pairs


@pytest.mark.parametrize(
    ("one", "other", "shape", "may"),
    [
        ("kill-host", "stop-host", Shape(3, 2, 2), False),
        ("kill-host", "stop-host", Shape(3, 2, 3), True),
        ("kill-host", "slow-host", Shape(3, 2, 2), True),
        ("kill-host", "kill-controller", Shape(2, 1, 1), False),
        ("kill-host", "kill-controller", Shape(2, 1, 2), True),
        ("kill-router", "kill-controller", Shape(2, 1, 2), False),
        ("kill-router", "kill-controller", Shape(2, 2, 2), True),
        ("kill-router", "kill-host", Shape(2, 2, 1), False),
        ("kill-host", "disk-error", Shape(3, 2, 2), False),
        ("scale-experts", "rebalance", Shape(3, 2, 2), False),
        ("scale-experts", "kill-controller", Shape(3, 2, 2), False),
        ("scale-experts", "kill-host", Shape(3, 2, 2), True),
    ],
)
def test_what_may_coincide(one: str, other: str, shape: Shape, may: bool) -> None:
    assert may_coincide(one, other, shape) is may
    assert may_coincide(other, one, shape) is may


def test_choosing_kinds() -> None:
    assert check_kinds(None) == ALL
    assert check_kinds(["stop-host", "kill-host", "kill-host"]) == ("kill-host", "stop-host")
    shape = Shape(2, 1, 1)
    assert {event.kind for planned in first(9, 0, shape, ("kill-host",)) for event in planned.events} == {"kill-host"}
    for wrong in ([], ["kill-hosts"], ["kill-host", ""]):
        with pytest.raises(ConfigError, match="choose among kill-host, kill-router"):
            check_kinds(wrong)


def view(*processes: Process, **changed: object) -> View:
    found = {
        "model": "m",
        "epoch": 1,
        "health": "ok",
        "reason": "",
        "min_replicas": 2,
        "missing_replicas": 0,
        "processes": processes,
        "routers": (
            {"router_id": "router-0", "broken_links": [], "late_hosts": [], "unreachable_experts": 0},
            {"router_id": "router-1", "broken_links": [], "late_hosts": [], "unreachable_experts": 0},
        ),
    }
    return View(**{**found, **changed})  # type: ignore[arg-type]


HOSTS = tuple(Process(f"expert-host-{i}", "expert_host", 10 + i, "here", "ready") for i in range(3))
ROUTERS = tuple(Process(f"router-{i}", "router", 20 + i, "here", "ready") for i in range(2))
STANDBY = Process("standby-0", "expert_host", 30, "here", "standby")
HOME = {"expert_host": 3, "router": 2, "standby": 1}


def event(kind: str, victim: int) -> Event:
    return Event(kind, victim, 1.0, 0)


def test_victims_differ_and_exist() -> None:
    target: Target = object()  # type: ignore[assignment]
    taken: set[str] = set()
    chosen = [fault_of(target, event("kill-host", 4), view(*HOSTS, STANDBY), HOME, taken).subject for _ in range(3)]
    assert sorted(chosen) == ["expert-host-0", "expert-host-1", "expert-host-2"]
    with pytest.raises(ClusterError, match="no expert_host"):
        fault_of(target, event("slow-host", 0), view(*HOSTS, STANDBY), HOME, taken)
    assert fault_of(target, event("rebalance", 0), view(*HOSTS), HOME, taken).subject == "the cluster"
    for kind in KINDS:
        everything = view(*HOSTS, *ROUTERS, Process("controller", "controller", 40, "here", "ready"))
        assert fault_of(target, event(kind, 1), everything, HOME, set()).kind == kind


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (view(*HOSTS, *ROUTERS, STANDBY), ""),
        (view(*HOSTS, *ROUTERS, STANDBY, health="degraded", reason="so it is"), "degraded: so it is"),
        (view(*HOSTS, *ROUTERS, STANDBY, missing_replicas=3), "3 replicas"),
        (view(*HOSTS[:2], *ROUTERS, STANDBY), "2 expert_host"),
        (view(*HOSTS, *ROUTERS), "wanted 3 expert_host, 2 router, 1 standby"),
        (view(*HOSTS, *ROUTERS, STANDBY, routers=view().routers[:1]), "no report of router-1"),
        (view(*HOSTS, ROUTERS[0], Process("router-1", "router", 21, "here", "stuck"), STANDBY), "router-1 is stuck"),
        (
            view(*HOSTS, *ROUTERS, STANDBY, routers=({**view().routers[0], "broken_links": ["x"]}, view().routers[1])),
            "x",
        ),
    ],
)
def test_whether_a_cluster_is_whole(found: View, reason: str) -> None:
    said = not_whole(found, HOME)
    assert reason in said
    assert bool(said) == bool(reason)


def test_a_killed_process_must_be_gone() -> None:
    """Right after it was killed the status still has it, in the best of health."""
    whole = view(*HOSTS, *ROUTERS, STANDBY)
    assert not_whole(whole, HOME, gone=[99]) == ""
    assert not_whole(whole, HOME, gone=[11]) == "expert-host-1 is pid 11 still"
