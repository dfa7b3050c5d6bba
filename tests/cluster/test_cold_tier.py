"""The cold tier's placement: the least load that its slots can have, few moves, and every promise of other plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.placement_table import EMPTY, PlacementTable, is_cold
from moray.cluster.assembly import cold_name, host_name
from moray.cluster.changes import moved_experts
from moray.cluster.cold_tier import cold_shares, coldest
from moray.cluster.load_monitor import balance
from moray.cluster.placement import plan_next
from moray.cluster.placement_plan import HostSpec, NotEnoughSlotsError, plan_placement
from moray.cluster.replica_counts import Floats
from moray.cluster.synthetic_load import with_noise, zipf_load
from moray.configs.errors import ConfigError
from moray.model.config import ModelConfig
from moray.model.testing import SMALL_CONFIG

LAYERS = 3
R1_LIKE = replace(
    ModelConfig.from_dict(dict(SMALL_CONFIG)),
    n_routed_experts=256,
    num_hidden_layers=LAYERS + 3,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
)


def hosts(count: int, cold: int) -> list[str]:
    return [host_name(i) for i in range(count)] + [cold_name(i) for i in range(cold)]


def nodes(names: list[str]) -> dict[str, str]:
    """Eight GPUs a node, one cold host a node."""
    return {name: name if is_cold(name) else f"gpu-{index // 8}" for index, name in enumerate(names)}


def held(table: PlacementTable, host: str, index: int) -> list[int]:
    return [expert for expert in table.slots[host][index] if expert != EMPTY]


def on_cold(table: PlacementTable, index: int) -> set[int]:
    return {expert for host in table.slots if is_cold(host) for expert in held(table, host, index)}


def least(load: Floats, number: int) -> float:
    """The sorted bound: the share of the load that the experts with the least have."""
    return float(np.sort(load, axis=1)[:, :number].sum() / load.sum())


@pytest.mark.parametrize("slots", [8, 32])
@pytest.mark.parametrize("exponent", [0.8, 1.0])
def test_cold_hosts_get_the_least_load_and_noise_moves_next_to_nothing(exponent: float, slots: int) -> None:
    """R1 on 31 GPUs and two CPU nodes."""
    names = hosts(31, 2)
    load = zipf_load(LAYERS, 256, exponent=exponent)
    bound = least(load, 2 * slots)
    anew = plan_next(R1_LIKE, names, cold_slots=slots, load=load, nodes=nodes(names)).table
    assert cold_shares(load, anew) == pytest.approx((bound, bound))
    before = plan_next(R1_LIKE, names, cold_slots=slots, nodes=nodes(names)).table
    assert cold_shares(load, before)[0] > 3 * bound
    table = plan_next(R1_LIKE, names, cold_slots=slots, load=load, nodes=nodes(names), current=before).table
    assert bound <= cold_shares(load, table)[0] <= 1.075 * bound
    hottest = np.argsort(-load, axis=1)[:, :32]
    for index in range(LAYERS):
        assert not on_cold(table, index) & set(hottest[index].tolist())
    for seed in range(3):
        noisy = with_noise(load, 0.05, seed=seed)
        after = plan_next(R1_LIKE, names, cold_slots=slots, load=noisy, nodes=nodes(names), current=table).table
        assert moved_experts(table, after) <= 0.005 * LAYERS * 256
        table = after


def test_equal_loads_move_nothing_to_the_cold_tier_or_from_it() -> None:
    names = hosts(31, 2)
    table = plan_next(R1_LIKE, names, cold_slots=8, nodes=nodes(names)).table
    for seed in range(3):
        noisy = with_noise(np.ones((LAYERS, 256)), 0.05, seed=seed)
        after = plan_next(R1_LIKE, names, cold_slots=8, load=noisy, nodes=nodes(names), current=table).table
        assert [on_cold(after, index) for index in range(LAYERS)] == [on_cold(table, index) for index in range(LAYERS)]


def test_before_anything_is_known_cold_experts_are_spread_over_the_groups() -> None:
    table = plan_next(R1_LIKE, hosts(31, 2), cold_slots=8).table
    for index in range(LAYERS):
        groups = [expert * 8 // 256 for expert in on_cold(table, index)]
        assert sorted(set(groups)) == list(range(8))
        assert max(map(groups.count, groups)) == 2


def test_each_kind_grows_by_itself() -> None:
    names = hosts(6, 2)
    load = zipf_load(LAYERS, 256, exponent=1.0)
    table = plan_next(R1_LIKE, names, cold_slots=16, load=load).table
    more = plan_next(R1_LIKE, hosts(7, 2), cold_slots=16, load=load, current=table).table
    assert [more.slots[cold_name(i)] for i in range(2)] == [table.slots[cold_name(i)] for i in range(2)]
    assert all(len(more.slots[host_name(6)][index]) in (32, 33) for index in range(LAYERS))
    colder = plan_next(R1_LIKE, hosts(6, 3), cold_slots=16, load=load, current=table).table
    assert all(on_cold(table, index) <= on_cold(colder, index) for index in range(LAYERS))
    assert cold_shares(load, colder)[0] == pytest.approx(least(load, 48), rel=0.08)
    fewer = plan_next(R1_LIKE, hosts(6, 1), cold_slots=16, load=load, current=table).table
    assert all(on_cold(fewer, index) <= on_cold(table, index) for index in range(LAYERS))
    none = plan_next(R1_LIKE, hosts(6, 0), cold_slots=16, load=load, current=table)
    assert not any(map(is_cold, none.table.slots))
    from_cold = [move for move in none.moves if any(map(is_cold, move.sources))]
    assert len(from_cold) >= 2 * 16 * LAYERS, "what only a leaving host has is copied from it"


def test_a_second_copy_costs_nothing_where_the_others_have_the_first() -> None:
    names = hosts(16, 2)
    load = zipf_load(LAYERS, 256, exponent=1.0)
    plan = plan_next(R1_LIKE, names, min_replicas=2, cold_slots=64, load=load, nodes=nodes(names))
    assert not plan.shortages
    assert cold_shares(load, plan.table) == (0.0, 0.0)
    coldest_first = np.argsort(load, axis=1)
    for index in range(LAYERS):
        assert on_cold(plan.table, index) == set(coldest_first[index, :128].tolist())
        copies = [sum(expert in held(plan.table, host, index) for host in names) for expert in range(256)]
        assert set(copies) == {2}


@pytest.mark.parametrize(("cold_slots", "cold"), [(None, 32), (1, 2), (127, 254)])
def test_slots_of_each_kind(cold_slots: int | None, cold: int) -> None:
    table = plan_next(R1_LIKE, hosts(2 if cold_slots else 14, 2), cold_slots=cold_slots).table
    for index in range(LAYERS):
        assert len(on_cold(table, index)) == cold
        sizes = [len(layers[index]) for host, layers in table.slots.items() if not is_cold(host)]
        assert sum(sizes) == 256 - cold
        assert max(sizes) - min(sizes) <= 1


def test_cold_hosts_must_leave_the_others_something() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_next(R1_LIKE, hosts(2, 2), cold_slots=128)
    assert "experts.cold.slots = 128: 2 cold hosts hold 256 of 256 experts and copies of a layer" in str(refusal.value)
    assert "use at most 127 slots" in str(refusal.value)


def test_the_balance_is_that_of_the_others_and_of_how_right_the_cold_experts_are() -> None:
    load = np.asarray([[4.0, 4.0, 1.0, 2.0]])
    right = PlacementTable(1, 0, 4, {"expert-host-0": ((0, 3),), "expert-host-1": ((1,),), "cold-host-0": ((2,),)})
    assert balance(load, right) == pytest.approx(5 / 6)
    wrong = PlacementTable(1, 0, 4, {"expert-host-0": ((0,),), "expert-host-1": ((1, 2),), "cold-host-0": ((3,),)})
    assert balance(load, wrong) == pytest.approx(1 / 2)
    assert cold_shares(load, wrong) == pytest.approx((2 / 11, 1 / 11))
    doubled = PlacementTable(1, 0, 4, {"expert-host-0": ((0, 1, 2, 3),), "cold-host-0": ((0, 1, 2, 3),)})
    assert balance(load, doubled) == 1.0, "what others have, too, is not asked of cold hosts"
    lost = PlacementTable(1, 0, 4, {"expert-host-0": ((0, 1, 2),), "cold-host-0": ((1,),)})
    assert balance(load, lost) == 0.0


def test_experts_change_places_until_half_of_what_is_tolerated_is_left() -> None:
    load = np.asarray([10.0, 1.0, 1.0, 1.0, 2.0, 1.05, 1.0, 3.0])
    now = np.zeros(8, dtype=np.bool_)
    now[[0, 3, 4, 5]] = True  # 14.05 where 4 is possible: 10 and 2 leave, 1.05 may stay
    assert np.flatnonzero(coldest(load, 4, now, keep=False)).tolist() == [2, 3, 5, 6]
    assert np.flatnonzero(coldest(load, 4, now, keep=True)).tolist() == [0, 3, 4, 5]
    assert np.flatnonzero(coldest(load, 2, now, keep=True)).tolist() == [3, 5], "the busiest leave"
    assert coldest(load, 5, now, keep=True)[now].all()
    assert coldest(load, 8, now, keep=False).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_hosts_of_both_kinds(data: st.DataObject) -> None:
    """A plan from nothing, then one with other hosts, another load and some that are dead."""
    experts = data.draw(st.integers(1, 12), "experts")
    min_replicas = data.draw(st.integers(1, 3), "min_replicas")
    current: PlacementTable | None = None
    for _ in range(2):
        specs = [
            HostSpec(
                f"h{i}",
                data.draw(st.integers(0, 14)),
                node=data.draw(st.sampled_from(["", "a", "b"])),
                alive=data.draw(st.integers(0, 5)) > 0,
                cold=data.draw(st.booleans()),
            )
            for i in range(data.draw(st.integers(1, 6)))
        ]
        load = np.asarray([data.draw(st.lists(st.floats(0, 100), min_size=experts, max_size=experts))])
        alive = [spec for spec in specs if spec.alive]
        try:
            plan = plan_placement(load, specs, first_layer=1, current=current, min_replicas=min_replicas)
        except NotEnoughSlotsError:
            assert sum(min(experts, int(spec.slots)) for spec in alive if isinstance(spec.slots, int)) < experts
            return
        table = plan.table
        assert list(table.slots) == [spec.host for spec in alive]
        assert table.missing(set(table.slots)) == []
        short = {shortage.expert for shortage in plan.shortages}
        for spec in alive:
            own = held(table, spec.host, 0)
            assert len(table.slots[spec.host][0]) == spec.slots
            assert len(set(own)) == len(own)
        for expert in range(experts):
            assert len(table.replicas(1, expert)) >= min_replicas or expert in short
        total = sum(loads[0] for loads in plan.host_load.values())
        assert total == pytest.approx(load.sum())
        again = plan_placement(load, specs, first_layer=1, current=table, min_replicas=min_replicas)
        assert {spec.host for spec in alive if spec.cold and held(again.table, spec.host, 0)} == {
            spec.host for spec in alive if spec.cold and held(table, spec.host, 0)
        }
        current = table
