"""What a plan says that a decode step costs."""

from __future__ import annotations

from functools import cache

import pytest

from moray.cluster.assembly import compute
from moray.cluster.planning import assumptions
from moray.cluster.planning.layout import lay_out
from moray.cluster.planning.nodes import parse_nodes, with_figures
from moray.cluster.planning.plan import make_plan
from moray.cluster.planning.sizes import ModelSizes
from moray.cluster.planning.step_cost import NETWORK, QUEUE, StepCost, StepCosts, load_seconds
from moray.configs.deployment import Deployment

from .plan_models import R1_CONFIG

BATCHES = (1, 8, 32, 128, 256)


@cache
def steps(nodes: str, *, gbit: float | None = None, routers: int = 1, context: int | None = None) -> list[StepCost]:
    groups = with_figures(parse_nodes(nodes), network_gbit_s=gbit)
    deployment = Deployment.from_dict({"routers": {"replicas": routers}})
    plan = make_plan("R1", R1_CONFIG, groups, deployment, batches=BATCHES, context=context)
    assert plan.fits, plan.problems
    return list(plan.steps)


@pytest.mark.parametrize(("batch", "distinct", "table_us"), [(1, 8, 408), (32, 163, 8336), (128, 252, 12866)])
def test_one_host_reads_what_a_roofline_says(batch: int, distinct: int, table_us: float) -> None:
    """All experts on one host: 256 * (1 - (1 - 8/256)^b) of them, 44.05 MB each, at an L40S's 864 GB/s."""
    deployment = Deployment.from_dict({})
    groups = parse_nodes("1x2xL40S")
    sizes = ModelSizes(R1_CONFIG, compute(deployment, gpus=2))
    layout = lay_out(sizes, groups, deployment, hosts=1, max_context=8192, cache_tokens=None)
    step = StepCosts(sizes, layout, deployment, price_per_hour=None).step(batch, 8192)
    a_layer = step.host_read / 58
    assert a_layer == pytest.approx(distinct * 44.05e6, rel=0.05)
    assert a_layer / 864e9 * 1e6 == pytest.approx(table_us, rel=0.05)


def test_a_step_is_the_sum_of_its_phases_and_of_its_resources() -> None:
    for step in steps("3x8xL40S"):
        assert sum(step.phases.values()) == pytest.approx(step.seconds)
        assert sum(step.resources.values()) == pytest.approx(step.seconds)
        assert step.tokens_per_user * step.seconds == pytest.approx(1)
        assert step.tokens_in_all == pytest.approx(step.batch * step.tokens_per_user)
        assert step.limit in step.resources


def test_more_requests_are_more_tokens_in_all_and_fewer_each() -> None:
    found = steps("3x8xL40S")
    assert [s.tokens_in_all for s in found] == sorted(s.tokens_in_all for s in found)
    assert [s.tokens_per_user for s in found] == sorted((s.tokens_per_user for s in found), reverse=True)


def test_the_network_limits_where_it_is_slow() -> None:
    slow, fast = (steps("3x8xL40S", gbit=gbit) for gbit in (10, 400))
    assert all(s.seconds >= f.seconds for s, f in zip(slow, fast, strict=True))
    assert slow[-1].limit == NETWORK
    assert fast[-1].limit != NETWORK
    sent = slow[-1].traffic
    assert sent.between_nodes < sent.sent + sent.received
    least = (sent.between_nodes / 2) / (10e9 / 8) * 58
    assert slow[-1].resources[NETWORK] >= least, "no more than the card's rate each way"


def test_on_one_node_nothing_crosses_the_network() -> None:
    for step in steps("1x8xH200"):
        assert step.traffic.between_nodes == 0
        assert step.resources.get(NETWORK, 0.0) == 0


def test_routers_share_the_hosts() -> None:
    """Two routers on two nodes do more where one's network card limits, and never more than the hosts can."""
    one, two = (steps("3x8xL40S", gbit=10, routers=count)[-1] for count in (1, 2))
    assert two.tokens_in_all > 1.5 * one.tokens_in_all
    many = steps("3x8xL40S", gbit=10000, routers=6)[1]
    assert many.resources[QUEUE] > 0
    busiest = many.host_read / (864e9 * assumptions.MEMORY_EFFICIENCY.value)
    assert many.seconds >= 6 * busiest * 0.999


def test_longer_contexts_cost_more() -> None:
    short, long = (steps("3x8xL40S", context=context)[2] for context in (1024, 16384))
    assert long.router_read - short.router_read == 32 * (16384 - 1024) * 70_272
    assert long.seconds > short.seconds


def test_what_does_not_run_as_it_is_says_so() -> None:
    notes = {step.batch: step.notes for step in steps("3x8xL40S")}
    assert notes[1] == notes[8] == notes[32] == ()
    assert notes[128] == ("KV pages for 40 a router only", "needs routers.max_running >= 128")


def test_the_price_of_a_million_tokens() -> None:
    groups = with_figures(parse_nodes("3x8xL40S"), price=24)
    plan = make_plan("R1", R1_CONFIG, groups, Deployment.from_dict({}), batches=(32,))
    assert plan.price_per_hour == pytest.approx(24)
    (step,) = plan.steps
    assert step.cost_per_million == pytest.approx(24 / (step.tokens_in_all * 3600) * 1e6)
    assert steps("3x8xL40S")[0].cost_per_million is None


def test_time_to_load_is_the_slowest_nodes() -> None:
    fast, slow = (with_figures(parse_nodes("17x1xL40S"), disk_gb_s=rate) for rate in (4, 1))
    plans = [make_plan("R1", R1_CONFIG, groups, Deployment.from_dict({}), batches=(1,)) for groups in (fast, slow)]
    seconds = [plan.load_s - assumptions.START.value for plan in plans]
    assert seconds[1] == pytest.approx(4 * seconds[0])
    assert seconds[1] == pytest.approx(16 * 58 * 44_050_944 / 1e9)
    assert plans[0].load_s == load_seconds(plans[0].layout)


def test_every_assumption_has_a_source() -> None:
    constants = {value for name, value in vars(assumptions).items() if name.isupper() and name != "ALL"}
    assert constants == set(assumptions.ALL)
    assert all(entry.source and entry.name for entry in assumptions.ALL)
