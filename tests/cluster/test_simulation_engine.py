"""Whole simulations: times that can be worked out by hand, what is conserved, and the same result for the same arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from moray.cluster.simulation.cluster import Site
from moray.cluster.simulation.engine import Options, simulate
from moray.cluster.simulation.failing import Failure
from moray.cluster.simulation.measure import Result
from moray.cluster.simulation.skew import Skew
from moray.cluster.simulation.trace import Arrival, Closed, Fixed, Listed, LogNormal, Poisson, Prefixes, Trace
from moray.configs.errors import ConfigError

from .simulation_sites import DENSE_LAYERS, MOE_LAYERS, PLAIN, PlainCosts, small_site

ONE = Listed([Arrival(0.0, prompt=8, output=3)])


def run(site: Site, trace: Trace, **options: object) -> Result:
    return simulate(site, trace, replace(Options(), **options))  # type: ignore[arg-type]


def times(result: Result) -> tuple[float, float]:
    """To the first token, and between tokens: the longest of both."""
    return result.ttft.longest, result.itl.longest


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "costs",
    [PLAIN, PlainCosts(shared=1 / 512), PlainCosts(shared=1 / 16), PlainCosts(way=0.0), PlainCosts(host=0.25)],
    ids=["plain", "shared hidden", "shared longest", "no links", "slow hosts"],
)
def test_a_request_alone_takes_as_long_as_its_parts(costs: PlainCosts) -> None:
    result = run(small_site(costs=costs), ONE)
    assert times(result) == (costs.one_step, costs.one_step)
    assert (result.finished, result.output_tokens, result.prompt_tokens, result.steps) == (1, 3, 8, 3)
    assert result.seconds == 3 * costs.one_step


def test_front_and_requests_take_their_time_beside_the_router() -> None:
    costs = PlainCosts(front_step=1 / 1024, taking_in=1 / 32)
    result = run(small_site(costs=costs), ONE)
    assert times(result) == (1 / 32 + costs.one_step + 1 / 1024, costs.one_step)


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    site = small_site(token_budget=32)
    result = run(site, Listed([Arrival(0.0, 8, 20), Arrival(0.01, 90, 1)]))
    # The second one comes during the first step and finds 31 tokens of each later one: 90 take three.
    assert result.ttft.longest == 4 * PLAIN.one_step - 0.01
    assert result.itl.longest == PLAIN.one_step


@pytest.mark.parametrize("budget", [64, 32])
def test_the_last_layer_is_computed_for_the_tokens_that_are_sampled_alone(budget: int) -> None:
    class ForEachToken(PlainCosts):
        def router_layer(self, tokens: int, kv_positions: int, kv_rows: int, longest: int) -> float:
            return tokens / 1024

        def shared_experts(self, tokens: int) -> float:
            return tokens / 256  # longer than what it is beside

    costs = ForEachToken(host=1 / 8192)
    result = run(small_site(costs=costs, token_budget=budget), Listed([Arrival(0.0, 64, 1)]))
    chunks = 64 // budget
    below = (DENSE_LAYERS + MOE_LAYERS - 1) * 64 / 1024 + (MOE_LAYERS - 1) * 64 / 256
    # The links and the host are hidden by the shared experts, but for those of one token.
    last = 1 / 1024 + max(1 / 256, 2 * costs.way + costs.host)
    assert result.ttft.longest == chunks * costs.step + below + last
    assert result.steps == chunks


@pytest.mark.parametrize("cores", [1.0, 2.0, 64.0])
def test_on_shared_cores_the_exchange_is_the_routers_work_too(cores: float) -> None:
    costs = PlainCosts(cores=cores, wake_s=1 / 2048)
    result = run(small_site(hosts=2, costs=costs), Listed([Arrival(0.0, 64, 1)]))
    # Both hosts compute at once, on two cores or one after the other on one.
    hosts = costs.host * max(1.0, 2 / cores)
    assert result.ttft.longest == costs.step + DENSE_LAYERS * costs.layer + MOE_LAYERS * (
        costs.layer + 2 * costs.way + hosts + 2 * costs.wake_s
    )


def test_routers_wait_for_each_other_at_the_hosts() -> None:
    trace = Listed([Arrival(0.0, 64, 1), Arrival(0.0, 64, 1)])
    together = run(small_site(routers=2), trace)
    # In the first layer the second waits until the hosts have done the first one's work; from then on they take turns.
    assert (together.ttft.p50, together.ttft.longest) == (
        PLAIN.one_step + PLAIN.host / 2,
        PLAIN.one_step + PLAIN.host,
    )


def test_two_micro_batches_hide_the_exchange() -> None:
    costs = PlainCosts(way=1 / 128)
    # So few tokens that both halves go through the last layer.
    plain = run(small_site(costs=costs), Listed([Arrival(0.0, 8, 1)])).ttft.longest
    overlapped = run(small_site(costs=replace(costs, overlap=True)), Listed([Arrival(0.0, 8, 1)])).ttft.longest
    # Twice the layers of the router and the hosts, as each half costs what the whole does here, but the links but once.
    assert overlapped < 2 * (plain - costs.step)
    assert overlapped > plain


@pytest.mark.parametrize("overlap", [False, True])
def test_in_lockstep_a_layer_is_the_sum_of_what_is_slowest(overlap: bool) -> None:
    costs = PlainCosts(overlap=overlap, shared=1 / 1024, way=1 / 64)
    site = small_site(hosts=4, routers=4, costs=costs, lockstep=True)
    result = run(site, Closed(4, Fixed(64), Fixed(2), requests=4))
    c = costs
    if overlap:
        layer = (
            max(c.layer + c.shared, c.way) + max(c.layer, c.way) + max(c.host, c.way) + max(c.host + c.shared, c.way)
        )
    else:
        layer = c.layer + c.shared + c.way + c.host + c.way
    step = c.step + DENSE_LAYERS * c.layer * (2 if overlap else 1) + MOE_LAYERS * layer
    assert result.ttft.longest == step
    if not overlap:  # a single token is not halved, but four of four ranks are
        assert result.itl.longest == step


def test_a_warm_up_is_not_measured() -> None:
    trace = Closed(4, Fixed(8), Fixed(8))
    whole, later = (run(small_site(), trace.shared_by(1), duration_s=4.0, warmup_s=warmup) for warmup in (0.0, 2.0))
    assert later.seconds == 2.0
    assert later.output_tokens < whole.output_tokens
    assert abs(later.output_rate - whole.output_rate) < whole.output_rate / 10


# ---- the real scheduler and pool ------------------------------------------------------------------------------------


def test_what_comes_with_its_pages_is_not_computed() -> None:
    def first_token(cached: int) -> float:
        site = small_site(token_budget=64)
        return run(site, Closed(1, Fixed(64), Fixed(2), cached=cached, requests=1)).ttft.longest

    class Counting(PlainCosts):
        def router_step(self, tokens: int, decoding: int, sampled: int, kv_positions: int) -> float:
            return tokens * 1.0

    site = small_site(costs=Counting(layer=0.0, host=0.0, way=0.0))
    assert run(site, Closed(1, Fixed(64), Fixed(1), requests=1)).ttft.longest == 64.0
    assert run(site, Closed(1, Fixed(64), Fixed(1), cached=63, requests=1)).ttft.longest == 1.0
    assert run(site, Closed(1, Fixed(64), Fixed(1), cached=48, requests=1)).ttft.longest == 16.0
    assert first_token(63) == first_token(0) == PLAIN.one_step


def test_shared_prefixes_are_found_in_the_pages_of_others() -> None:
    trace = Closed(1, Fixed(100), Fixed(2), requests=5, prefixes=Prefixes(1, 64))
    assert run(small_site(), trace).prefix_hit_tokens == 4 * 64
    assert run(small_site(), Closed(1, Fixed(100), Fixed(2), requests=5)).prefix_hit_tokens == 0


def test_where_pages_run_out_requests_start_over_and_end_all_the_same() -> None:
    site = small_site(pages=24)
    result = run(site, Closed(8, Fixed(60), Fixed(60), requests=16))
    assert result.preemptions > 0
    assert (result.finished, result.output_tokens) == (16, 16 * 60)
    assert result.kv_most > 0.9


def test_what_does_not_fit_is_refused() -> None:
    site = small_site(pages=8)
    result = run(site, Listed([Arrival(0.0, 100, 100), Arrival(0.0, 8, 2)]))
    assert (result.refused, result.finished) == (1, 1)


def test_full_queues_refuse_and_nothing_is_lost() -> None:
    site = small_site(max_running=2, token_budget=8)
    trace = Listed([Arrival(i / 1024, 8, 4) for i in range(200)])
    result = run(site, trace)
    assert result.refused > 0
    assert result.finished + result.refused == 200
    assert result.output_tokens == result.finished * 4
    assert result.queue_most <= 64


@pytest.mark.parametrize("lockstep", [False, True])
def test_what_waits_for_too_long_is_refused(lockstep: bool) -> None:
    site = small_site(max_running=1, lockstep=lockstep)
    patient = run(site, Listed([Arrival(i / 8, 8, 10) for i in range(60)]))
    site = replace(site, settings=replace(site.settings, max_wait_s=2.0))
    result = run(site, Listed([Arrival(i / 8, 8, 10) for i in range(60)]))
    assert (patient.refused, patient.finished) == (0, 60)
    assert result.refused > 0
    assert result.finished + result.refused == 60
    assert result.output_tokens == result.finished * 10
    assert result.ttft.longest < 2.0 + 3 * PLAIN.one_step < patient.ttft.longest


def test_a_target_keeps_prompts_out_of_the_way_of_answers() -> None:
    class Counting(PlainCosts):
        def router_step(self, tokens: int, decoding: int, sampled: int, kv_positions: int) -> float:
            return (8 + tokens) / 1024

    site = small_site(costs=Counting(layer=0.0, host=0.0, way=0.0), token_budget=512)
    trace = Listed([Arrival(i / 4, 100, 50) for i in range(40)])
    free = run(site, trace)
    bound = run(replace(site, settings=replace(site.settings, target_itl_s=1 / 16)), trace)
    assert free.itl.longest > 100 / 1024
    assert bound.itl.p99 < 1 / 16 < free.itl.p99
    assert free.finished == bound.finished == 40


def test_requests_go_to_the_router_with_the_fewest() -> None:
    costs = PlainCosts(host=0.0)
    result = run(small_site(routers=4, costs=costs), Closed(8, Fixed(8), Fixed(4), requests=8))
    # Two each: the first has a step for itself, the second is in the one after it.
    assert (result.ttft.p50, result.ttft.longest) == (1.5 * costs.one_step, 2 * costs.one_step)
    assert result.finished == 8


# ---- approximations -------------------------------------------------------------------------------------------------


def test_how_many_layers_are_drawn_does_not_matter_where_all_are_alike() -> None:
    def of(blocks: int) -> tuple[float, float]:
        return times(run(small_site(), ONE, blocks=blocks))

    assert of(1) == of(2) == of(4) == of(100)


def test_twins_are_so_many_times_the_same() -> None:
    site = small_site(hosts=4, routers=2, lockstep=True)
    alone = run(site, Closed(4, Fixed(16), Fixed(8), requests=8))
    with_twins = run(replace(site, twins=3), Closed(12, Fixed(16), Fixed(8), requests=24))
    assert with_twins.ttft == alone.ttft
    assert with_twins.itl == alone.itl
    assert (with_twins.finished, with_twins.output_tokens) == (3 * alone.finished, 3 * alone.output_tokens)


def test_skew_costs_throughput_and_spares_win_it_back() -> None:
    costs = PlainCosts(host_pair=1 / 4096)

    def of(site: Site, skew: Skew) -> Result:
        return run(site, Closed(32, Fixed(16), Fixed(16), requests=64), skew=skew)

    even = of(small_site(hosts=8, costs=costs), Skew())
    skewed = of(small_site(hosts=8, costs=costs), Skew("zipf", 1.0))
    doubled = of(small_site(hosts=8, costs=costs, min_replicas=2), Skew("zipf", 1.0))
    assert min(even.balance, doubled.balance) > skewed.balance
    assert (even.placement_balance, doubled.placement_balance > skewed.placement_balance) == (1.0, True)
    assert min(even.output_rate, doubled.output_rate) > skewed.output_rate


# ---- the same again -------------------------------------------------------------------------------------------------


def traces(seed: int) -> list[Callable[[], Trace]]:
    return [
        lambda: Poisson(20.0, LogNormal(60, 300), LogNormal(20, 90), seed=seed),
        lambda: Closed(24, LogNormal(60, 300), LogNormal(20, 90), seed=seed),
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["rate", "clients"])
@pytest.mark.parametrize("cores", [None, 3.0], ids=["devices", "cores"])
def test_the_same_arguments_give_the_same_result_to_the_last_bit(kind: int, cores: float | None) -> None:
    site = small_site(hosts=4, routers=2, min_replicas=2, costs=PlainCosts(cores=cores, host_pair=1 / 8192))

    def of(seed: int) -> Result:
        return run(site, traces(seed)[kind](), duration_s=1.5, seed=seed, skew=Skew("lognormal", 1.0, drift_s=4.0))

    first = of(1)
    assert first == of(1)
    assert first.output_tokens > 20
    assert first != of(2)


def test_what_comes_is_what_there_is_in_the_end() -> None:
    result = run(small_site(routers=2), Poisson(30.0, Fixed(40), Fixed(10), seed=3), duration_s=6.0)
    arrivals = Poisson(30.0, Fixed(40), Fixed(10), seed=3).arrivals()
    came = sum(1 for _ in itertools.takewhile(lambda arrival: arrival.at <= 6.0, arrivals))
    assert result.finished + result.unfinished + result.refused + result.failed == came
    assert len(result.moments) == 100
    assert round(sum(moment.output_rate for moment in result.moments) * 0.06) == result.output_tokens


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_simulated_is_refused() -> None:
    endless = Closed(1, Fixed(1), Fixed(1))
    for site, trace, options, told in (
        (small_site(), endless, Options(), "goes on for ever"),
        (small_site(), ONE, Options(duration_s=1.0, warmup_s=1.0), "leaves nothing"),
        (small_site(), ONE, Options(blocks=0), "blocks = 0"),
        (small_site(), ONE, Options(duration_s=1.0, failures=(Failure(1.0, "router-0"),)), "comes after the end"),
        (small_site(costs=PlainCosts(cores=2.0), lockstep=True), ONE, Options(), "lockstep is for GPUs"),
        (small_site(costs=PlainCosts(cores=2.0), twins=2), ONE, Options(), "no twins"),
    ):
        with pytest.raises(ConfigError, match=told):
            simulate(site, trace, options)
