"""`moray plan` with a cold tier: what it takes where, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moray.cluster.planning.footprint import CONTEXT, SERVICES, WEIGHTS
from moray.cluster.planning.layout import lay_out
from moray.cluster.planning.nodes import parse_nodes
from moray.cluster.planning.plan import Plan, make_plan
from moray.cluster.planning.step_cost import COLD_MEMORY
from moray.cluster.planning.traffic import random_experts
from moray.configs.deployment import Deployment
from moray.model.config import ModelConfig

from .plan_models import R1_CONFIG, SHORT_CONFIG

EXPERT = 3 * 7168 * 2048  # parameters


def planned(nodes: str, cold: dict[str, Any], *, skew: float = 0.0, config: ModelConfig = SHORT_CONFIG) -> Plan:
    deployment = Deployment.from_dict({"experts": {"cold": cold}})
    groups = tuple(g if g.gpus else replace(g, memory_bandwidth=4e11, cpu_flops=5e12) for g in parse_nodes(nodes))
    return make_plan("R1", config, groups, deployment, batches=(32,), skew=skew)


def test_eight_of_80_gb_and_two_cpu_nodes_hold_r1() -> None:
    """Without the cold tier they do not: see `test_plan_fit.py`."""
    plan = planned("1x8xH100,2xcpu:768", {"hosts": 2, "slots": 32, "fp8": "decode"}, config=R1_CONFIG)
    assert plan.fits
    assert plan.placement is not None
    assert (plan.placement.hosts, plan.placement.cold_hosts, plan.placement.cold_slots) == (7, 2, 32)
    assert plan.placement.cold_share == 0.25
    for index, name in enumerate(("cold-host-0", "cold-host-1")):
        process = plan.layout.process(name)
        assert (process.node, process.slots) == (f"node1-{index}", 58 * 32)
        assert process.memory[WEIGHTS] == 58 * 32 * 2 * EXPERT
        assert CONTEXT not in process.memory
        assert SERVICES in plan.layout.hosts[name].fixed
        assert plan.layout.hosts[name].capacity == 768 << 30


def test_a_cold_tier_too_large_for_its_nodes_does_not_fit() -> None:
    plan = planned("3x8xL40S,2xcpu:128", {"hosts": 2, "slots": 96, "dtype": "float32"})
    of_tier, each = plan.problems
    assert of_tier.startswith("all together: ")
    assert of_tier.endswith("261.1 GB usable of 274.9 GB"), "of the nodes that are too small, not of all"
    assert each.startswith("2 devices with an expert host each: up to ")
    assert [c.what for c in plan.changes][:2] == ["experts.cold.dtype: bfloat16", "experts.cold.fp8: keep"]


def test_without_nodes_for_them_cold_hosts_are_refused() -> None:
    plan = planned("3x8xL40S", {"hosts": 2})
    assert plan.problems == ("2 cold hosts are asked for, and every node has GPUs: add some without, as in 2xcpu:512",)


def test_nodes_without_gpus_hold_nothing_where_no_cold_host_is_asked_for() -> None:
    plan = planned("3x8xL40S,2xcpu:512", {})
    assert plan.fits
    assert {device.node.group.gpus for device in plan.layout.devices} == {8}


def test_the_slower_of_both_kinds_counts_and_skew_makes_it_less() -> None:
    cold = {"hosts": 2, "slots": 8, "dtype": "float32"}
    nodes = "4x8xRTX4090,2xcpu:768"
    uniform, skewed, without = planned(nodes, cold), planned(nodes, cold, skew=1.0), planned(nodes, {})
    assert uniform.placement is not None
    assert skewed.placement is not None
    assert uniform.placement.cold_share == 16 / 256
    assert skewed.placement.cold_share == pytest.approx(0.0105, abs=0.0001)
    (slow,), (less,), (fast,) = uniform.steps, skewed.steps, without.steps
    assert slow.limit == COLD_MEMORY
    assert slow.phases["experts"] > less.phases["experts"] > fast.phases["experts"]
    assert slow.host_read > fast.host_read, "float32 where the others read FP8"


@pytest.mark.parametrize("cold", [{"hosts": 2, "slots": 8}, {"hosts": 3}])
def test_the_search_counts_slots_as_the_placement_does(cold: dict[str, Any]) -> None:
    plan = planned("3x8xL40S,2xcpu:768", cold)
    quick = lay_out(
        plan.sizes, plan.groups, plan.deployment, hosts=None, max_context=8192, cache_tokens=None, table=False
    )
    assert {h: quick.process(h).slots for h in quick.hosts} == {h: plan.layout.process(h).slots for h in quick.hosts}


def test_popular_experts_are_chosen_more_often() -> None:
    popularity = np.arange(1, 257, dtype=np.float64) ** -1.0
    chosen = random_experts(R1_CONFIG, 4000, seed=1, popularity=popularity)
    counts = np.bincount(chosen.flatten(), minlength=256)
    assert counts.sum() == 4000 * 8
    assert all(len(set(row)) == 8 for row in chosen[:50].tolist())
    assert counts[:16].sum() > 4 * counts[-128:].sum()
