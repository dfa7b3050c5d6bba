"""The real autoscaler on simulated clusters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moray.cluster.simulation.cluster import Site
from moray.cluster.simulation.engine import Options, simulate
from moray.cluster.simulation.measure import Result
from moray.cluster.simulation.skew import Skew
from moray.cluster.simulation.trace import Arrival, Closed, Fixed, Listed, Trace
from moray.configs.autoscale import Autoscale

from .simulation_sites import RECOVERY, PlainCosts, small_site

QUICK = {"up_after_s": 2.0, "down_after_s": 4.0, "cooldown_s": 3.0}
SLOW_HOSTS = PlainCosts(step=1 / 512, layer=1 / 1024, host=1 / 1024, host_pair=1 / 1024, way=0.0)


def policy(experts: dict[str, Any] | None = None, routers: dict[str, Any] | None = None) -> Autoscale:
    of_experts = {"enabled": False} if experts is None else {"enabled": True, **QUICK, **experts}
    of_routers = {"enabled": False} if routers is None else {"enabled": True, **QUICK, **routers}
    return Autoscale.model_validate({"experts": of_experts, "routers": of_routers})


def run(site: Site, trace: Trace, **options: Any) -> Result:
    return simulate(site, trace, replace(Options(duration_s=20.0), **options))


def told(result: Result, what: str) -> list[str]:
    return [happening.detail for happening in result.happenings if happening.what == what]


def test_busy_hosts_get_more_beside_them() -> None:
    autoscale = policy({"max_hosts": 8, "high_utilisation": 0.6, "rebalance_below": 0.0})
    site = small_site(hosts=2, costs=SLOW_HOSTS, autoscale=autoscale, free_seats=("node2-0", "node2-1") * 3)
    result = run(site, Closed(8, Fixed(4), Fixed(64)))
    assert "compute" in told(result, "autoscale")[0]
    assert result.moments[0].hosts == 2 < result.moments[-1].hosts <= 8
    assert result.moments[-1].output_rate > result.moments[10].output_rate
    # Nobody waited for the change.
    assert result.itl.longest < 1.0


def test_idle_hosts_leave() -> None:
    autoscale = policy({"min_hosts": 2, "max_hosts": 8, "rebalance_below": 0.0})
    result = run(small_site(hosts=4, autoscale=autoscale), Listed([Arrival(19.0, 8, 4)]))
    assert result.moments[-1].hosts < 4
    assert result.finished == 1


def test_where_no_device_is_free_nothing_is_added() -> None:
    autoscale = policy({"max_hosts": 8, "high_utilisation": 0.6, "rebalance_below": 0.0})
    result = run(small_site(hosts=2, costs=SLOW_HOSTS, autoscale=autoscale), Closed(8, Fixed(4), Fixed(64)))
    assert "too few free devices" in told(result, "autoscale_failed")[0]
    assert result.moments[-1].hosts == 2


def test_experts_move_to_where_they_are_balanced() -> None:
    autoscale = policy({"min_hosts": 4, "max_hosts": 4, "rebalance_below": 0.95, "low_utilisation": 0.0})
    site = small_site(hosts=4, autoscale=autoscale, token_budget=512)
    result = run(site, Closed(4, Fixed(400), Fixed(4)), skew=Skew("zipf", 1.0), seed=3)
    assert told(result, "autoscale")[0].startswith("balance")
    assert len(told(result, "placed")) >= 1
    placed = next(happening.at for happening in result.happenings if happening.what == "placed")
    before = [moment.balance for moment in result.moments if moment.at < placed]
    after = [moment.balance for moment in result.moments if moment.at > placed + 1]
    assert sum(after) / len(after) > sum(before) / len(before) + 0.05


def test_requests_that_wait_get_more_routers_and_the_last_one_leaves_when_they_are_through() -> None:
    autoscale = policy(routers={"max_routers": 2, "waiting_per_router": 2.0})
    site = small_site(max_running=2, token_budget=8, autoscale=autoscale, free_seats=("node2-0",))
    result = run(site, Closed(10, Fixed(4), Fixed(10), requests=60), duration_s=40.0)
    assert result.finished == 60
    assert max(moment.routers for moment in result.moments) == 2
    assert [h.what for h in result.happenings if "router" in h.what] == ["routers_added"]
    quiet = Listed([*(Arrival(i / 8, 4, 10) for i in range(60)), Arrival(35.0, 4, 10)])
    result = run(site, quiet, duration_s=40.0)
    assert result.finished == 61
    assert [h.what for h in result.happenings if "router" in h.what] == ["routers_added", "router_left"]
    assert result.moments[-1].routers == 1


def test_the_same_again() -> None:
    autoscale = policy({"max_hosts": 6, "high_utilisation": 0.6}, {"max_routers": 2, "waiting_per_router": 1.0})
    site = small_site(
        hosts=2,
        costs=SLOW_HOSTS,
        max_running=4,
        autoscale=autoscale,
        free_seats=("node2-0",) * 8,
        recovery=replace(RECOVERY, start_s=0.5),
    )
    first, again = (
        run(site, Closed(12, Fixed(8), Fixed(32)), skew=Skew("zipf", 0.8), duration_s=12.0, seed=9) for _ in range(2)
    )
    assert told(first, "autoscale")
    assert first == again
