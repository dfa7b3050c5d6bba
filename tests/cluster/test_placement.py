"""Placement: pure functions, held to their invariants for any model and any number of hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.placement import even_placement
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
