"""Placement: pure functions, held to their invariants for any model and any number of hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.placement_table import EMPTY, PlacementTable
from moray.cluster.load_monitor import balance
from moray.cluster.placement import even_placement, next_placement, plan_next
from moray.cluster.placement_plan import HostSpec, Lack, NotEnoughSlotsError, plan_placement
from moray.cluster.synthetic_load import zipf_load
from moray.configs.errors import ConfigError
from moray.model.config import ModelConfig
from moray.model.testing import SMALL_CONFIG

CONFIG = ModelConfig.from_dict(dict(SMALL_CONFIG))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(experts=st.integers(1, 300), layers=st.integers(1, 12), dense=st.integers(0, 4), share=st.floats(0, 1))
def test_even_placement(experts: int, layers: int, dense: int, share: float) -> None:
    dense = min(dense, layers)
    config = replace(CONFIG, n_routed_experts=experts, num_hidden_layers=layers, first_k_dense_replace=dense)
    hosts = [f"h{i}" for i in range(max(1, int(experts * share)))]
    table = even_placement(config, hosts, epoch=4)
    assert (table.epoch, table.experts, table.first_layer, list(table.slots)) == (4, experts, dense, hosts)
    assert table.layers == layers - dense
    assert table.missing(set(hosts)) == []
    for index in range(table.layers):
        held = [expert for host in hosts for expert in table.slots[host][index]]
        assert sorted(held) == list(range(experts)), "every expert is in exactly one slot"
        sizes = [len(table.slots[host][index]) for host in hosts]
        assert max(sizes) - min(sizes) <= 1
    totals = [sum(len(layer) for layer in table.slots[host]) for host in hosts]
    assert max(totals) - min(totals) <= 1, "the larger shares go round"


def test_neighbours_are_apart() -> None:
    table = even_placement(CONFIG, ["a", "b"])
    for layer in CONFIG.moe_layers:
        for expert in range(CONFIG.n_routed_experts - 1):
            here, there = table.replicas(layer, expert)[0][0], table.replicas(layer, expert + 1)[0][0]
            assert here != there


def test_replicas_name_the_slot() -> None:
    table = even_placement(CONFIG, ["a", "b", "c"])
    for layer in CONFIG.moe_layers:
        for expert in range(CONFIG.n_routed_experts):
            ((host, slot),) = table.replicas(layer, expert)
            assert table.slots[host][layer - table.first_layer][slot] == expert


def test_missing_without_a_host() -> None:
    table = even_placement(CONFIG, ["a", "b"])
    missing = table.missing({"b"})
    held = [(layer + table.first_layer, e) for layer, experts in enumerate(table.slots["a"]) for e in experts]
    assert sorted(missing) == sorted(held)
    assert len(table.missing(set())) == 2 * 8


def test_more_hosts_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.hosts = 9: the model has 8 experts"):
        even_placement(CONFIG, [f"h{i}" for i in range(9)])


def model(experts: int, layers: int, *, dense: int = 1, groups: int = 1) -> ModelConfig:
    return replace(
        CONFIG,
        n_routed_experts=experts,
        num_hidden_layers=layers + dense,
        first_k_dense_replace=dense,
        n_group=groups,
        topk_group=min(CONFIG.topk_group, groups),
    )


def names(count: int) -> list[str]:
    return [f"expert-host-{i}" for i in range(count)]


def sizes(table: PlacementTable, index: int) -> list[int]:
    return [len(layers[index]) for layers in table.slots.values()]


def held(table: PlacementTable, host: str, index: int) -> set[int]:
    own = [expert for expert in table.slots[host][index] if expert != EMPTY]
    assert len(set(own)) == len(own), "no two copies on one host"
    return set(own)


def planned_for_equal_loads(
    config: ModelConfig, hosts: Sequence[str], min_replicas: int, current: PlacementTable | None
) -> PlacementTable:
    """Even shares and nothing else: what a plan without load, spare slots and wishes must stay equal to."""
    if current is None and min_replicas == 1:
        return even_placement(config, hosts)
    layers = len(config.moe_layers)
    share, larger = divmod(config.n_routed_experts * min_replicas, len(hosts))
    specs = [
        HostSpec(host, tuple(share + ((index + layer * larger) % len(hosts) < larger) for layer in range(layers)))
        for index, host in enumerate(hosts)
    ]
    load = np.ones((layers, config.n_routed_experts))
    return plan_placement(
        load, specs, first_layer=config.first_k_dense_replace, current=current, min_replicas=min_replicas
    ).table


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_without_load_and_wishes_shares_are_equal(data: st.DataObject) -> None:
    config = model(data.draw(st.integers(4, 40)), data.draw(st.integers(1, 4)))
    min_replicas = data.draw(st.integers(1, 2))
    current: PlacementTable | None = None
    for _ in range(3):
        numbers = data.draw(st.sets(st.integers(0, 5), min_size=min_replicas, max_size=4))
        hosts = [f"expert-host-{i}" for i in sorted(numbers)]
        table = next_placement(config, hosts, min_replicas=min_replicas, current=current)
        assert table == planned_for_equal_loads(config, hosts, min_replicas, current)
        current = table


def test_a_first_plan_fills_every_slot_from_the_disk() -> None:
    config = model(10, 2)
    for spare_slots in (0, 1):
        plan = plan_next(config, names(3), spare_slots=spare_slots)
        filled = {(move.host, move.layer, move.slot): move.expert for move in plan.moves}
        assert filled == {
            (host, config.first_k_dense_replace + index, slot): expert
            for host, layers in plan.table.slots.items()
            for index, row in enumerate(layers)
            for slot, expert in enumerate(row)
        }
        assert {move.sources for move in plan.moves} == {()}
        assert plan.changed
        assert plan.balancedness_before == (0.0, 0.0)
        assert np.mean(plan.balancedness) == pytest.approx(balance(np.ones((2, 10)), plan.table))
    assert plan_next(config, names(3)).table == even_placement(config, names(3))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_plan(data: st.DataObject) -> None:
    """Two plans one after the other, with everything that can be asked for."""
    config = model(data.draw(st.integers(4, 24)), data.draw(st.integers(1, 3)))
    experts, layers, first = config.n_routed_experts, len(config.moe_layers), config.first_k_dense_replace
    min_replicas = data.draw(st.integers(1, 2))
    current: PlacementTable | None = None
    for _ in range(2):
        count = data.draw(st.integers(min_replicas, 4))
        hosts = [f"expert-host-{i}" for i in sorted(data.draw(st.permutations(range(6)))[:count])]
        spare_slots = data.draw(st.integers(0, 3))
        some = st.tuples(st.integers(first, first + layers - 1), st.integers(0, experts - 1))
        replicas = data.draw(st.dictionaries(some, st.integers(1, 5), max_size=4))
        nodes = data.draw(st.dictionaries(st.sampled_from(hosts), st.sampled_from(["a", "b"])))
        load = zipf_load(layers, experts, seed=data.draw(st.integers(0, 9))) if data.draw(st.booleans()) else None
        plan = plan_next(
            config,
            hosts,
            min_replicas=min_replicas,
            spare_slots=spare_slots,
            load=load,
            replicas=replicas,
            nodes=nodes,
            current=current,
        )
        table = plan.table
        assert list(table.slots) == hosts
        assert table.epoch == (1 if current is None else current.epoch + 1)
        assert table.missing(set(hosts)) == []
        for index in range(layers):
            assert max(sizes(table, index)) - min(sizes(table, index)) <= 1
            copies = [sum(expert in held(table, host, index) for host in hosts) for expert in range(experts)]
            assert min(copies) >= min_replicas
            for expert in range(experts):
                wanted = replicas.get((first + index, expert), 1)
                short = Lack.HOSTS in {s.lack for s in plan.shortages if (s.layer, s.expert) == (first + index, expert)}
                assert copies[expert] >= min(wanted, len(hosts))
                assert short == (wanted > len(hosts)), "what there are hosts for finds slots"
        current = table


def test_spare_slots_take_what_is_asked_for_most() -> None:
    config = model(16, 3)
    load = zipf_load(3, 16)
    before = next_placement(config, names(4))
    plan = plan_next(config, names(4), spare_slots=2, load=load, current=before)
    assert [sizes(plan.table, index) for index in range(3)] == [[6] * 4] * 3
    for index, weights in enumerate(load):
        copies = [len(plan.table.replicas(config.first_k_dense_replace + index, expert)) for expert in range(16)]
        assert copies[int(np.argmax(weights))] == max(copies) > 1
    assert balance(load, plan.table) > 0.95 > balance(load, before)


def test_copies_that_are_asked_for_find_slots_where_no_slot_is_spare() -> None:
    config = model(8, 3, dense=3)
    current = next_placement(config, names(4))
    plan = plan_next(config, names(4), replicas={(4, 5): 3, (4, 6): 2}, current=current)
    assert plan.shortages == ()
    assert sorted(sum(sizes(plan.table, index)) for index in range(3)) == [8, 8, 11], "only that layer, only by these"
    assert (len(plan.table.replicas(4, 5)), len(plan.table.replicas(4, 6))) == (3, 2)
    assert {(move.layer, move.expert) for move in plan.moves} == {(4, 5), (4, 6)}
    # And none beyond the spare ones, where these suffice.
    plan = plan_next(config, names(4), spare_slots=1, replicas={(4, 5): 3, (4, 6): 2}, current=current)
    assert [sum(sizes(plan.table, index)) for index in range(3)] == [12, 12, 12]
    # Forgotten, the copies go.
    plan = plan_next(config, names(4), current=plan.table)
    assert (plan.moves, plan.changed) == ((), True)
    assert len(plan.table.replicas(4, 5)) == 1


def test_more_copies_than_hosts_are_a_shortage() -> None:
    plan = plan_next(model(8, 1), names(2), replicas={(1, 3): 5})
    assert [str(s) for s in plan.shortages] == ["expert 3 of layer 1 has 2 of 5 replicas: too few hosts are alive"]


def test_a_host_that_is_to_come_back_is_replaced_by_spare_slots() -> None:
    config = model(8, 2)
    current = next_placement(config, names(4), spare_slots=1)
    plan = plan_next(config, names(4), spare_slots=1, current=current, dead={"expert-host-2"})
    alive = [name for name in names(4) if name != "expert-host-2"]
    assert list(plan.table.slots) == alive
    assert plan.table.missing(set(alive)) == []
    for host in alive:
        assert [len(row) for row in plan.table.slots[host]] == [3, 3], "no more slots than they have"
    assert not any("expert-host-2" in move.sources for move in plan.moves)
    bare = next_placement(config, names(4))
    with pytest.raises(NotEnoughSlotsError, match="2 are missing") as refusal:
        plan_next(config, names(4), current=bare, dead={"expert-host-2"})
    assert (refusal.value.missing, refusal.value.per_layer) == (4, 2)


def test_hosts_that_leave_are_sources_and_the_dead_are_not() -> None:
    config = model(8, 2)
    current = next_placement(config, names(3))
    stay = names(2)
    plan = plan_next(config, stay, current=current)
    assert plan.table == next_placement(config, stay, current=current)
    assert {move.sources for move in plan.moves} == {("expert-host-2",)}
    plan = plan_next(config, stay, current=current, dead={"expert-host-2"})
    assert {move.sources for move in plan.moves} == {()}
    # The nearest first, whether it leaves or not.
    nodes = {"expert-host-0": "a", "expert-host-1": "b", "expert-host-2": "c", "expert-host-3": "c"}
    current = next_placement(config, names(3), min_replicas=2)
    plan = plan_next(
        config, ["expert-host-0", "expert-host-1", "expert-host-3"], min_replicas=2, current=current, nodes=nodes
    )
    near = [move.sources for move in plan.moves if move.host == "expert-host-3" and "expert-host-2" in move.sources]
    assert near
    assert all(len(sources) == 2 and sources[0] == "expert-host-2" for sources in near)


def test_copies_are_on_distinct_nodes() -> None:
    config = model(8, 2)
    nodes = {name: f"node-{i // 2}" for i, name in enumerate(names(4))}
    plan = plan_next(config, names(4), min_replicas=2, nodes=nodes)
    assert plan.shortages == ()
    for layer in config.moe_layers:
        for expert in range(8):
            assert len({nodes[host] for host, _ in plan.table.replicas(layer, expert)}) == 2


def test_a_host_that_is_yet_to_start_comes_to_the_one_node_there_is() -> None:
    """On one machine nothing moves, and nothing is short, for the sake of a second."""
    config, nodes = model(12, 2), dict.fromkeys(names(2), "here")
    current = next_placement(config, names(2), min_replicas=2)
    plan = plan_next(config, names(3), min_replicas=2, current=current, nodes=nodes)
    assert plan.shortages == ()
    assert plan.table == next_placement(config, names(3), min_replicas=2, current=current)
    # With several it may come to another one, and copies there are worth having.
    nodes = {"expert-host-0": "here", "expert-host-1": "there"}
    plan = plan_next(config, names(3), min_replicas=2, current=current, nodes=nodes)
    assert plan.shortages == ()


def test_a_group_stays_on_one_node_where_that_costs_nothing() -> None:
    config = model(16, 2, groups=4)
    nodes = {name: f"node-{i // 2}" for i, name in enumerate(names(4))}
    load = np.ones((2, 16))
    plan = plan_next(config, names(4), load=load, nodes=nodes)
    assert plan.balancedness == (1.0, 1.0)
    for layer in config.moe_layers:
        for group in range(4):
            where = {nodes[plan.table.replicas(layer, expert)[0][0]] for expert in range(4 * group, 4 * group + 4)}
            assert len(where) == 1


@pytest.mark.parametrize(
    ("replicas", "message"),
    [({(0, 1): 2}, "replicas 0:1=2: layers with experts are 1 to 2"), ({(1, 8): 2}, "experts 0 to 7")],
)
def test_copies_of_what_is_not_there(replicas: dict[tuple[int, int], int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_next(model(8, 2), names(2), replicas=replicas)


def test_too_few_hosts_for_the_copies() -> None:
    with pytest.raises(
        ConfigError, match=r"min_replicas = 3: copies of an expert are on distinct hosts, and there are 2"
    ):
        plan_next(model(8, 2), names(2), min_replicas=3)
