"""The plain-data parts of dispatch: where experts can be asked for, and how long a host may take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.host_latency import HostLatency
from moray.actors.placement_table import EMPTY, PlacementTable
from moray.actors.routes import IF_NEED_BE, NO, YES, Routes


@st.composite
def tables(draw: st.DrawFn) -> PlacementTable:
    hosts, layers, experts = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    slots = st.lists(st.integers(EMPTY, experts - 1), max_size=5).map(tuple)
    held = [draw(st.tuples(*[slots] * layers)) for _ in range(hosts)]
    return PlacementTable(1, 3, experts, {f"h{i}": layers for i, layers in enumerate(held)})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(table=tables(), data=st.data())
def test_routes_are_what_the_table_says(table: PlacementTable, data: st.DataObject) -> None:
    routes = Routes(table)
    for _ in range(2):
        askable = {host: data.draw(st.sampled_from([NO, IF_NEED_BE, YES]), host) for host in table.slots}
        reachable = {host for host, level in askable.items() if level != NO}
        assert routes.unreachable(reachable) == len(table.missing(reachable))
        for layer in range(3, 3 + table.layers):
            found = routes.of_layer(layer, tuple(askable.values()))
            assert found is routes.of_layer(layer, tuple(askable.values()))
            for expert in range(table.experts):
                replicas = [(host, slot) for host, slot in table.replicas(layer, expert) if askable[host] != NO]
                best = max((askable[host] for host, _ in replicas), default=NO)
                count = found.count[expert]
                assert [
                    (routes.hosts[host], slot)
                    for host, slot in zip(found.hosts[:count, expert], found.slots[:count, expert], strict=True)
                ] == [(host, slot) for host, slot in replicas if askable[host] == best]


def known(*replies: tuple[int, float]) -> HostLatency:
    latency = HostLatency()
    for pairs, seconds in replies:
        latency.record(pairs, seconds)
    return latency


def test_an_unknown_host_has_a_second_and_no_fence() -> None:
    for latency in (known(), known(*[(8, 0.001)] * 7)):
        assert latency.usual_s(8) is None
        assert latency.limits_s(8) == (1.0, np.inf)


@pytest.mark.parametrize(
    ("usual", "allowed", "fence"), [(0.001, 0.061, 1.0), (0.04, 0.12, 1.0), (0.5, 1.5, 5.0)], ids=str
)
def test_fast_hosts_are_late_sooner(usual: float, allowed: float, fence: float) -> None:
    latency = known(*[(8, usual)] * 8)
    assert latency.limits_s(8) == pytest.approx((allowed, fence))
    assert latency.median_s == usual


def test_an_outlier_in_ten_is_not_usual_and_a_slower_host_is() -> None:
    assert known(*[(8, 0.01)] * 58, *[(8, 3.0)] * 6).usual_s(8) == 0.01
    assert known(*[(8, 0.01)] * 56, *[(8, 3.0)] * 8).usual_s(8) == 3.0
    assert known(*[(8, 3.0)] * 64, *[(8, 0.01)] * 64).usual_s(8) == 0.01, "what is long ago is forgotten"


def test_other_sizes_bound_a_size_that_was_not_seen() -> None:
    decoding, both = known(*[(8, 0.01)] * 8), known(*[(8, 0.01)] * 8, *[(1000, 0.2)] * 8)
    assert decoding.usual_s(9) == 0.01
    assert decoding.usual_s(100) == pytest.approx(0.08), "eight times the pairs, no more than eight times the time"
    assert decoding.usual_s(1) == 0.01, "fewer pairs take no longer"
    assert both.usual_s(1000) == 0.2
    assert both.usual_s(20) == pytest.approx(0.02)
    assert both.usual_s(500) == 0.2
