"""What simulated failures do: who notices when, who takes over, what is restored, and that no request is lost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moray.cluster.simulation.cluster import Site
from moray.cluster.simulation.engine import Options, simulate
from moray.cluster.simulation.failing import Failure
from moray.cluster.simulation.measure import Result
from moray.cluster.simulation.trace import Closed, Fixed
from moray.configs.errors import ConfigError

from .simulation_sites import PLAIN, RECOVERY, PlainCosts, small_site

STEP = PLAIN.one_step
LAST_BEFORE = 12 * STEP
"""Of a request that came at 0, its last token before 1 s."""

NOTICED = RECOVERY.process_noticed_s


def run(site: Site, *failures: Failure, clients: int = 1, output: int = 40, **options: Any) -> Result:
    """Every client has one request, and all of them end."""
    trace = Closed(clients, Fixed(8), Fixed(output), requests=clients)
    return simulate(site, trace, replace(Options(), failures=failures, **options))


def happenings(result: Result) -> list[str]:
    return [happening.what for happening in result.happenings]


# ---- expert hosts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [None, 64.0], ids=["devices", "cores"])
def test_without_copies_a_step_waits_until_the_host_is_restored(cores: float | None) -> None:
    site = small_site(costs=PlainCosts(cores=cores))
    result = run(site, Failure(1.0, "expert-host-2"))
    restored = 1.0 + NOTICED + 2.0 + 1.0
    # The step begins anew then, from its first layer.
    assert result.itl.longest == restored + STEP - LAST_BEFORE
    (effect,) = result.failures
    assert (effect.streams, effect.longest_gap_s, effect.usual_gap_s) == (1, result.itl.longest, STEP)
    assert (result.finished, result.failed, result.output_tokens) == (1, 0, 40)
    assert happenings(result) == ["failed", "restoring", "restored"]


def test_a_warm_process_is_sooner_there() -> None:
    site = small_site(recovery=replace(RECOVERY, standby=1))
    result = run(site, Failure(1.0, "expert-host-2"))
    assert result.itl.longest == 1.0 + NOTICED + 0.25 + 1.0 + STEP - LAST_BEFORE


@pytest.mark.parametrize("cores", [None, 64.0], ids=["devices", "cores"])
def test_with_copies_others_answer_within_the_step(cores: float | None) -> None:
    site = small_site(min_replicas=2, costs=PlainCosts(cores=cores))
    result = run(site, Failure(1.0, "expert-host-2"), Failure(1.0, "expert-host-2"))
    assert STEP < result.itl.longest <= STEP + NOTICED + PLAIN.host + 2 * PLAIN.way
    assert (result.finished, result.failed, result.output_tokens) == (1, 0, 40)
    assert result.resent == 1


def test_who_knows_in_time_does_not_even_ask() -> None:
    # It ends, and that is known, while the router computes what comes before the first layer's experts.
    failure = Failure(12 * STEP + 1 / 512, "expert-host-2")
    result = run(small_site(min_replicas=2), failure)
    assert (result.itl.longest, result.resent) == (STEP, 0)
    alone = run(small_site(), failure)
    assert alone.itl.longest == 1 / 512 + NOTICED + 2.0 + 1.0 + STEP


def test_what_takes_too_long_fails() -> None:
    result = run(small_site(restore_timeout_s=0.5), Failure(1.0, "expert-host-2"), clients=3)
    assert (result.finished, result.failed, result.unfinished) == (0, 3, 0)
    assert result.failures[0].failed == 3
    assert "requests_failed" in happenings(result)


def test_where_its_device_is_gone_the_others_take_its_experts_over() -> None:
    result = run(small_site(), Failure(1.0, "expert-host-2", gone=True), output=80)
    assert happenings(result) == ["failed", "going_on_without", "placed"]
    assert [moment.hosts for moment in result.moments][-1] == 3
    assert (result.finished, result.output_tokens) == (1, 80)
    # Its 16 experts are loaded by three hosts on two nodes: sooner than one would.
    assert 0.5 < result.itl.longest < 1.0


def test_where_another_device_is_free_the_host_comes_back_there() -> None:
    result = run(small_site(free_seats=("node2-0",)), Failure(1.0, "expert-host-2", gone=True))
    assert happenings(result) == ["failed", "restoring", "restored"]
    assert result.moments[-1].hosts == 4


def test_where_nobody_has_memory_for_its_experts_requests_fail() -> None:
    site = small_site(slots_per_host=16, restore_timeout_s=5.0)
    result = run(site, Failure(1.0, "expert-host-2", gone=True))
    told = [happening.detail for happening in result.happenings if happening.what == "not_restored"]
    assert "memory for 16" in told[0]
    assert (result.finished, result.failed) == (0, 1)


def test_copies_outlive_a_node() -> None:
    site = small_site(hosts=6, min_replicas=2)
    result = run(site, Failure(1.0, "node0-1"), output=80)
    assert result.itl.longest <= STEP + RECOVERY.node_noticed_s + PLAIN.host + 2 * PLAIN.way
    assert (result.finished, result.failed) == (1, 0)
    assert [h.at for h in result.happenings if h.what == "going_on_without"] == [1.0 + RECOVERY.node_given_up_s]
    assert result.moments[-1].hosts == 4
    assert result.moments[-1].unreachable == 0


def test_a_failure_during_a_change_has_both_planned_for() -> None:
    site = small_site(hosts=8, min_replicas=3, recovery=replace(RECOVERY, node_given_up_s=0.5))
    result = run(site, Failure(1.0, "node0-0"), Failure(1.75, "node0-2"), output=200)
    assert "gave_way" in happenings(result)
    assert happenings(result)[-1] == "placed"
    assert result.moments[-1].hosts == 4
    assert (result.finished, result.failed) == (1, 0)


# ---- routers --------------------------------------------------------------------------------------------------------


def test_requests_of_a_lost_router_go_on_at_another_one() -> None:
    result = run(small_site(routers=2), Failure(1.0, "router-1"), clients=4)
    (effect,) = result.failures
    assert effect.moved == 2
    assert (result.finished, result.failed, result.output_tokens) == (4, 0, 4 * 40)
    assert effect.longest_gap_s < 1.0


def test_a_router_on_a_silent_node_is_missed_later() -> None:
    site = small_site(routers=2)
    site = replace(site, nodes={**site.nodes, "router-0": "node2-0"})
    result = run(site, Failure(1.0, "node2-0"), clients=2)
    assert result.failures[0].moved == 1
    assert RECOVERY.router_silent_s < result.failures[0].longest_gap_s < RECOVERY.router_silent_s + 4 * STEP
    assert (result.finished, result.output_tokens) == (2, 2 * 40)


def test_requests_wait_for_the_only_router() -> None:
    result = run(small_site(), Failure(1.0, "router-0"))
    restored = 1.0 + NOTICED + 2.0 + 1.0
    assert result.itl.longest == restored + STEP - LAST_BEFORE
    assert (result.finished, result.failed, result.output_tokens) == (1, 0, 40)
    assert happenings(result) == ["failed", "restored"]


def test_but_not_for_ever() -> None:
    site = small_site(restore_timeout_s=1.0)
    result = run(site, Failure(1.0, "router-0"))
    assert (result.finished, result.failed) == (0, 1)
    gone = run(site, Failure(1.0, "router-0", gone=True))
    assert (gone.finished, gone.failed) == (0, 1)


# ---- others ---------------------------------------------------------------------------------------------------------


def test_in_lockstep_one_loss_is_everybodys() -> None:
    site = small_site(routers=4, lockstep=True, gpus=4, machines=2)
    result = run(site, Failure(1.0, "expert-host-2"), clients=8)
    (effect,) = result.failures
    assert (effect.streams, effect.moved) == (8, 8)
    # Two ranks of a node read their experts and everything else: 2 * (1 + 1) GiB.
    assert effect.longest_gap_s > RECOVERY.node_given_up_s + 2.0 + 4.0
    assert (result.finished, result.failed, result.output_tokens) == (8, 0, 8 * 40)


def test_the_same_failures_give_the_same_result() -> None:
    def of() -> Result:
        site = small_site(routers=2, min_replicas=2)
        return run(site, Failure(0.5, "node0-0"), Failure(1.0, "router-1"), clients=6, seed=5)

    assert of() == of()


@pytest.mark.parametrize(
    ("site", "target", "told"),
    [
        (small_site(), "expert-host-9", "no such process or node; there are expert-host-0"),
        (small_site(lockstep=True), "node9", "no such process or node"),
        (small_site(routers=2, twins=2), "router-0", "none can fail by itself"),
    ],
    ids=["apart", "lockstep", "twins"],
)
def test_what_is_not_there_cannot_fail(site: Site, target: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run(site, Failure(1.0, target), clients=2)
