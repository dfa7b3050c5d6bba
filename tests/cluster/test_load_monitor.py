"""What is measured from counters: differences, decay, other processes of one name, and how even a placement is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.placement_table import EMPTY, PlacementTable
from moray.cluster.load_monitor import LoadMonitor, UtilisationMonitor, balance
from moray.cluster.placement_plan import HostSpec, plan_placement
from moray.cluster.synthetic_load import zipf_load


def counts(*rows: list[int]) -> npt.NDArray[np.int64]:
    return np.asarray(rows, dtype=np.int64)


def monitor(half_life_s: float = 10.0) -> LoadMonitor:
    return LoadMonitor(2, 2, half_life_s=half_life_s)


# ---- load ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_at_first() -> None:
    load = monitor()
    assert (load.load.tolist(), load.tokens) == ([[0, 0], [0, 0]], 0)
    # When the first counters grew is not known: they are where counting begins.
    load.observe("router-0", counts([100, 0], [7, 7]), 5.0)
    assert load.tokens == 0


def test_differences_of_all_routers_add_up() -> None:
    load = monitor()
    load.observe("router-0", counts([100, 0], [7, 7]), 0.0)
    load.observe("router-1", counts([0, 0], [0, 0]), 0.0)
    load.observe("router-0", counts([101, 2], [7, 10]), 0.0)
    load.observe("router-1", counts([10, 0], [0, 20]), 0.0)
    assert load.load.tolist() == [[11, 2], [0, 23]]
    assert load.tokens == 36


def test_tokens_fade() -> None:
    load = monitor(half_life_s=10.0)
    load.observe("router-0", counts([0, 0], [0, 0]), 100.0)
    load.observe("router-0", counts([8, 0], [4, 4]), 100.0)
    load.observe("router-0", counts([8, 0], [4, 4]), 110.0)
    assert load.load.tolist() == [[4, 0], [2, 2]]
    load.observe("router-0", counts([8, 3], [4, 4]), 130.0)
    assert load.load.tolist() == [[1, 3], [0.5, 0.5]]
    load.observe("router-0", counts([8, 3], [4, 5]), 90.0)
    assert load.load.tolist() == [[1, 3], [0.5, 1.5]], "a clock that goes back does not make it grow"


def test_the_time_between_observations_does_not_matter() -> None:
    often, seldom = monitor(), monitor()
    for router in (often, seldom):
        router.observe("router-0", counts([0, 0], [0, 0]), 0.0)
        router.observe("router-0", counts([64, 0], [0, 8]), 1.0)
    for second in range(2, 41):
        often.observe("router-0", counts([64, 0], [0, 8]), float(second))
    seldom.observe("router-0", counts([64, 0], [0, 8]), 40.0)
    np.testing.assert_allclose(often.load, seldom.load, rtol=1e-12)


def test_a_smaller_number_is_another_process() -> None:
    load = monitor()
    load.observe("router-0", counts([5, 5], [5, 5]), 0.0)
    load.observe("router-0", counts([9, 4], [6, 6]), 0.0)
    assert load.load.tolist() == [[9, 4], [6, 6]], "all of it was counted since"
    load.observe("router-0", counts([9, 5], [6, 6]), 0.0)
    assert load.load.tolist() == [[9, 5], [6, 6]]


def test_a_router_that_is_forgotten_begins_anew() -> None:
    load = monitor()
    load.observe("router-0", counts([0, 0], [0, 0]), 0.0)
    load.observe("router-0", counts([5, 5], [5, 5]), 0.0)
    load.forget("router-0")
    load.forget("router-9")
    assert load.tokens == 20, "what it counted remains"
    load.observe("router-0", counts([1000, 1000], [1000, 1000]), 0.0)
    assert load.tokens == 20


def test_nobody_else_changes_what_was_measured() -> None:
    load = monitor()
    mine = counts([0, 0], [0, 0])
    load.observe("router-0", mine, 0.0)
    mine += 3
    load.load[:] = 99
    load.observe("router-0", mine, 0.0)
    assert load.load.tolist() == [[3, 3], [3, 3]]


# ---- utilisation --------------------------------------------------------------------------------------------------------


def test_utilisation_over_a_window() -> None:
    busy = UtilisationMonitor(window_s=10.0)
    assert busy.observe("a", 100.0, 0.0) == 0.0
    assert busy.observe("a", 101.0, 2.0) == 0.5
    for second in range(3, 30):
        found = busy.observe("a", 101.0, float(second))
    assert found == 0.0, "what is older than the window does not count"
    assert busy.observe("a", 106.0, 30.0) == 0.5, "over the whole window"
    assert busy.observe("a", 200.0, 31.0) == 1.0


def test_utilisation_of_seldom_seen_hosts() -> None:
    busy = UtilisationMonitor(window_s=10.0)
    busy.observe("a", 0.0, 0.0)
    assert busy.observe("a", 25.0, 100.0) == 0.25, "a longer time than the window, if there is nothing between"
    assert busy.observe("a", 25.0, 100.0) == 0.25, "asked twice at once"


def test_utilisation_of_another_process() -> None:
    busy = UtilisationMonitor()
    busy.observe("a", 50.0, 0.0)
    busy.observe("a", 60.0, 10.0)
    assert busy.observe("a", 3.0, 11.0) == 0.0
    assert busy.observe("a", 3.5, 12.0) == 0.5


def test_mean_utilisation() -> None:
    busy = UtilisationMonitor()
    assert busy.mean(["a", "b"]) == 0.0
    for host, seconds in {"a": 2.0, "b": 6.0, "c": 10.0}.items():
        busy.observe(host, 0.0, 0.0)
        busy.observe(host, seconds, 10.0)
    busy.observe("new", 7.0, 10.0)
    assert busy.mean(["a", "b", "new", "unseen"]) == pytest.approx(0.4)
    busy.forget("b")
    busy.forget("unseen")
    assert busy.mean(["a", "b"]) == pytest.approx(0.2)


# ---- balance ------------------------------------------------------------------------------------------------------------


def table(**slots: list[list[int]]) -> PlacementTable:
    rows = {host: tuple(tuple(row) for row in layers) for host, layers in slots.items()}
    return PlacementTable(1, 0, 4, rows)


def test_balance_is_the_mean_over_layers() -> None:
    placed = table(a=[[0, 1], [0, 1]], b=[[2, 3], [2, 3]])
    assert balance(np.asarray([[1.0, 1, 1, 1], [3, 3, 1, 1]]), placed) == pytest.approx((1 + 4 / 6) / 2)
    assert balance(np.zeros((2, 4)), placed) == 1.0, "nothing measured: equal loads"


def test_balance_shares_tokens_out_between_replicas() -> None:
    load = np.asarray([[4.0, 1, 1, 2]])
    assert balance(load, table(a=[[0, 1]], b=[[2, 3]])) == pytest.approx(4 / 5)
    assert balance(load, table(a=[[0, 1, EMPTY]], b=[[2, 3, 0]])) == pytest.approx(1.0), "3 of 4 and 1 of 4"


def test_balance_of_hosts_that_have_nothing_or_differ() -> None:
    load = np.ones((1, 4))
    assert balance(load, table(a=[[0, 1]], b=[[2, 3]], c=[[]])) == 1.0, "a host without slots is none of them"
    assert balance(load, table(a=[[0, 1]], b=[[2, 3]], c=[[EMPTY]])) == pytest.approx(2 / 3)
    placed = table(a=[[0, 1, 2]], b=[[3]])
    assert balance(load, placed) == pytest.approx(2 / 3)
    assert balance(load, placed, {"a": 3.0}) == 1.0


def test_balance_where_an_expert_is_nowhere() -> None:
    placed = table(a=[[0, 1]], b=[[2, EMPTY]])
    assert balance(np.ones((1, 4)), placed) == 0.0
    assert balance(np.asarray([[1.0, 1, 2, 0]]), placed) == 1.0, "nobody asks for it"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), hosts=st.integers(1, 5), spare=st.integers(0, 3), fast=st.floats(0.5, 2.0))
def test_balance_is_what_a_plan_reports(seed: int, hosts: int, spare: int, fast: float) -> None:
    load = zipf_load(3, 12, seed=seed)
    specs = [HostSpec(f"h{i}", -(-12 // hosts) + spare) for i in range(hosts)]
    specs[0] = replace(specs[0], speed=fast)
    plan = plan_placement(load, specs, first_layer=0)
    assert balance(load, plan.table, {"h0": fast}) == pytest.approx(float(np.mean(plan.balancedness)))
