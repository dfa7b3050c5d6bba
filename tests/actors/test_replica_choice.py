"""Replica choice: every pair goes to a replica of its expert, and the hosts' pairs come out even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.native_library import NativeRoutes, Outcome, actors_library
from moray.actors.replica_choice import choose_replicas, pour
from moray.actors.routes import IntArray
from moray.cluster.shared_load import shared_load


def tables(replicas: list[list[int]]) -> tuple[IntArray, IntArray]:
    """Hosts of each expert's replicas [R, E] and their count [E]."""
    hosts = np.zeros((max(map(len, replicas)), len(replicas)), dtype=np.int64)
    for expert, where in enumerate(replicas):
        hosts[: len(where), expert] = where
    return hosts, np.array([len(where) for where in replicas])


def pairs_per_host(choice: IntArray, experts: IntArray, hosts: IntArray, n: int) -> list[int]:
    counted: list[int] = np.bincount(hosts[choice, experts], minlength=n).tolist()
    return counted


@st.composite
def steps(draw: st.DrawFn) -> tuple[IntArray, IntArray, list[list[int]], int]:
    """Top-k experts of some tokens: experts of the pairs, their tokens, replicas of each expert, and how many hosts."""
    n, experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    replicas = [
        draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True), f"replicas of {e}")
        for e in range(experts)
    ]
    tokens, k = draw(st.integers(0, 40)), draw(st.integers(1, min(4, experts)))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = [generator.choice(experts, k, replace=False) for _ in range(tokens)]
    picked = np.concatenate(rows) if rows else np.zeros(0)
    return picked.astype(np.int64), np.arange(tokens).repeat(k), replicas, n


@settings(max_examples=200, deadline=None, derandomize=True)
@given(step=steps())
def test_any_step(step: tuple[IntArray, IntArray, list[list[int]], int]) -> None:
    experts, rows, replicas, n = step
    hosts, count = tables(replicas)
    choice = choose_replicas(experts, hosts, count)
    assert choice.shape == experts.shape
    assert choice.dtype == np.int64
    assert (choice >= 0).all()
    assert (choice < count[experts]).all()
    load = np.bincount(experts, minlength=len(count))
    assert np.array_equal(choice, choose_replicas(experts, hosts, count, load=load)), "the same step, the same choice"
    busy = pairs_per_host(choice, experts, hosts, n)
    if busy:
        assert max(busy) <= max(pairs_per_host(rows % count[experts], experts, hosts, n)) + 1


WIDTH = 3
"""Slots that keys have room for; which one a key names is none of the choice's business."""


def native_choice(experts: IntArray, hosts: IntArray, count: IntArray, n: int) -> IntArray | None:
    """The choice of native code; None if it leaves it to others."""
    library = actors_library()
    assert library is not None, "the package was installed without its native actors: is there a C++ compiler?"
    slots = np.arange(hosts.size).reshape(hosts.shape) % WIDTH
    keys = (hosts * WIDTH + slots).astype(np.uint16)
    routes = NativeRoutes(keys.ctypes.data, count.ctypes.data, *hosts.shape, WIDTH, n)
    choice = np.full(len(experts) + 1, 77, dtype=np.int32)
    outcome = library.choose_replicas(experts.ctypes.data, len(experts), routes, choice.ctypes.data)
    assert choice[-1] == 77, "nothing is written past the end"
    if outcome == Outcome.LEFT:
        return None
    assert outcome == Outcome.DONE
    return choice[:-1].astype(np.int64)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(some=st.lists(steps(), min_size=1, max_size=3))
def test_native_code_chooses_the_same(some: list[tuple[IntArray, IntArray, list[list[int]], int]]) -> None:
    """Step after step, of more and of fewer experts and hosts: nothing is left of the one before."""
    for experts, _, replicas, n in some:
        hosts, count = tables(replicas)
        found = native_choice(experts, hosts, count, n)
        assert found is not None
        assert np.array_equal(found, choose_replicas(experts, hosts, count))


def test_native_code_chooses_the_same_for_the_experts_of_r1() -> None:
    """256 of them, hot ones on many of 32 hosts, and others on one."""
    generator = np.random.default_rng(1)
    count = np.minimum(generator.zipf(1.5, 256), 9)
    hosts = np.stack([generator.permutation(32)[:9] for _ in range(256)], axis=1)
    likely = np.minimum(generator.zipf(1.3, 256), 50).astype(np.float64)
    for tokens in (1, 7, 64, 512):
        rows = [generator.choice(256, 8, replace=False, p=likely / likely.sum()) for _ in range(tokens)]
        experts = np.concatenate(rows).astype(np.int64)
        found = native_choice(experts, hosts, count, 32)
        assert found is not None
        assert np.array_equal(found, choose_replicas(experts, hosts, count))


@pytest.mark.parametrize("experts", [[0, 3], [-1, 0], [1 << 40, 0], [2, 0]])
def test_native_code_leaves_what_nobody_can_be_asked_for(experts: list[int]) -> None:
    """An expert that does not exist, and one that has no replica."""
    hosts, count = np.array([[0, 1, 0], [1, 0, 0]]), np.array([2, 1, 0])
    assert native_choice(np.array(experts), hosts, count, 2) is None


def test_native_code_leaves_hosts_that_do_not_exist() -> None:
    hosts, count = np.array([[0, 1], [2, 0]]), np.array([2, 1])
    assert native_choice(np.array([0, 1]), hosts, count, 2) is None
    assert native_choice(np.array([1]), hosts, count, 2) is not None, "nobody asks for the other one"


def test_native_code_leaves_more_replicas_than_there_are() -> None:
    assert native_choice(np.array([0]), np.array([[0], [1]]), np.array([3]), 2) is None


def test_what_nobody_can_be_asked_for_may_be_left_out() -> None:
    hosts, count = tables([[0, 1], [1], [0, 1]])
    count[2] = 0
    experts = np.array([0, 1, 0, 1, 0, 0])
    assert pairs_per_host(choose_replicas(experts, hosts, count), experts, hosts, 2) == [3, 3]


def test_two_hosts_share_what_both_hold() -> None:
    # Expert 0 is on both hosts, 1 on the first alone: the second takes all of 0 until it is level.
    hosts, count = tables([[0, 1], [0]])
    experts = np.array([0, 1, 0, 1, 0, 1, 0, 0])
    choice = choose_replicas(experts, hosts, count)
    assert pairs_per_host(choice, experts, hosts, 2) == [4, 4]
    assert choice.tolist() == [0, 0, 1, 0, 1, 0, 1, 1], "runs, in the order of rows"


def test_faster_hosts_get_more() -> None:
    hosts, count = tables([[0, 1]])
    experts = np.zeros(40, dtype=np.int64)
    choice = choose_replicas(experts, hosts, count, speed=[1.0, 3.0])
    assert pairs_per_host(choice, experts, hosts, 2) == [10, 30]


def test_better_than_by_row_on_skewed_steps() -> None:
    generator = np.random.default_rng(0)
    weight = np.arange(1, 65, dtype=np.float64) ** -1.0
    replicas = [[e % 8, (e + 3) % 8] if e < 8 else [e % 8] for e in range(64)]
    hosts, count = tables(replicas)
    held = np.zeros((8, 64), dtype=np.bool_)
    for expert, where in enumerate(replicas):
        held[where, expert] = True
    worst: dict[str, list[float]] = {"row": [], "chosen": [], "best": []}
    for _ in range(20):
        rows = [generator.choice(64, 4, replace=False, p=weight / weight.sum()) for _ in range(64)]
        experts = np.concatenate(rows)
        by_row = np.arange(64).repeat(4) % count[experts]
        worst["row"].append(max(pairs_per_host(by_row, experts, hosts, 8)))
        worst["chosen"].append(max(pairs_per_host(choose_replicas(experts, hosts, count), experts, hosts, 8)))
        pairs = np.bincount(experts, minlength=64).astype(np.float64)
        worst["best"].append(float(shared_load(pairs, held, np.ones(8), until=1.0).max()))
    assert np.mean(worst["chosen"]) < 0.9 * np.mean(worst["row"])
    assert np.mean(worst["chosen"]) <= np.mean(worst["best"]) + 1.0, "tokens are whole: no better than one too many"


def test_pour() -> None:
    assert pour(6.0, [0.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == pytest.approx([4.0, 2.0, 0.0])
    assert pour(8.0, [0.0, 0.0], [1.0, 3.0]) == pytest.approx([2.0, 6.0])
    assert pour(0.0, [5.0], [1.0]) == [0.0]
