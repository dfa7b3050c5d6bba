"""Everything that can be asked of a running cluster beside another number of hosts: routers, copies, drains, rebalancing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moray.actors.messages import ProcessState
from moray.cluster.changes import Wanted
from moray.cluster.controller import Controller
from moray.configs.errors import ConfigError, MorayError

from .thread_cluster import ThreadSpawner, ask, deployment, eventually, tokens


def hosts(controller: Controller) -> list[str]:
    return list(controller.table.slots)


def test_routers_come_and_go_under_a_running_request(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    seen: list[dict[str, str]] = []

    def scale(routers: int) -> Callable[[], None]:
        def run() -> None:
            change = controller.change(Wanted(routers=routers))
            assert (change.epoch, change.moved) == (1, 0)
            seen.append(controller.directory().routers)

        return run

    steps = {5: scale(3), 20: scale(1)}
    assert tokens(ask(controller, at=lambda count: steps[count]() if count in steps else None)) == expected
    assert [list(routers) for routers in seen] == [["router-0", "router-1", "router-2"], ["router-0"]]
    assert [p.id for p in controller.status().processes if p.role == "router"] == ["router-0"]
    assert spawner.routers["router-2"].router is not None
    assert spawner.routers["router-2"].router.stopped.is_set()
    with pytest.raises(ConfigError, match="0 routers"):
        controller.change(Wanted(routers=0))


def test_a_router_that_leaves_ends_its_requests_first(
    controller: Controller, spawner: ThreadSpawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[ProcessState] = []
    real = controller._launcher.remove_router

    def remove(name: str) -> None:
        states.extend(p.state for p in controller.status().processes if p.id == name)
        assert name not in controller.directory().routers
        real(name)

    monkeypatch.setattr(controller._launcher, "remove_router", remove)
    controller.change(Wanted(routers=1))
    assert states == ["leaving"]


def test_a_drained_host_is_emptied_and_ended(checkpoint: Path, spawner: ThreadSpawner, expected: list[int]) -> None:
    controller = Controller(deployment(checkpoint, hosts=3), spawner)
    controller.start()
    try:
        plan = controller.change(Wanted(drain=("expert-host-1",)), dry_run=True)
        assert (plan.removed, plan.added, hosts(controller)) == (
            ("expert-host-1",),
            (),
            ["expert-host-0", "expert-host-1", "expert-host-2"],
        )
        outputs = ask(
            controller,
            at=lambda n: controller.change(Wanted(drain=("expert-host-1",))) if n == 6 else None,  # type: ignore[arg-type]
        )
        assert tokens(outputs) == expected
        assert hosts(controller) == ["expert-host-0", "expert-host-2"]
        assert spawner.hosts["expert-host-1"].host._stopping.is_set()
        with pytest.raises(
            ConfigError, match="drain expert-host-1: no such expert host; there are expert-host-0, expert-host-2"
        ):
            controller.change(Wanted(drain=("expert-host-1",)))
        with pytest.raises(ConfigError, match="at least one"):
            controller.change(Wanted(drain=("expert-host-0", "expert-host-2")))
    finally:
        controller.stop()


def test_a_drained_host_can_be_replaced_at_once(controller: Controller, expected: list[int]) -> None:
    change = controller.change(Wanted(experts=2, drain=("expert-host-0",)))
    assert (change.added, change.removed) == (("expert-host-2",), ("expert-host-0",))
    assert tokens(ask(controller)) == expected


def test_copies_of_one_expert(controller: Controller, expected: list[int]) -> None:
    layer = controller.table.first_layer
    change = controller.change(Wanted(replicas={(layer, 3): 2}))
    assert (change.moved >= 1, change.added, change.removed) == (True, (), ())
    assert len(controller.table.replicas(layer, 3)) == 2
    assert tokens(ask(controller)) == expected
    controller.change(Wanted(experts=3))
    assert len(controller.table.replicas(layer, 3)) == 2, "what was asked for holds on"
    controller.change(Wanted(replicas={(layer, 3): 0}))
    assert controller._registry.replicas == {}
    assert controller.change(Wanted(replicas={(layer, 3): 9}), dry_run=True).shortages
    with pytest.raises(ConfigError, match="replicas 99:0=2"):
        controller.change(Wanted(replicas={(99, 0): 2}))
    assert tokens(ask(controller)) == expected


def test_rebalancing_for_the_load_that_was_measured(
    checkpoint: Path, spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = Controller(deployment(checkpoint, hosts=2, spare_slots=2), spawner)
    controller.start()
    try:
        with pytest.raises(ConfigError, match="no load was measured yet"):
            controller.change(Wanted(rebalance=True))
        # What was routed before the first look is nobody's load.
        eventually(lambda: tokens(ask(controller)) == expected and controller._observer._monitor.tokens > 0)
        measured = controller._observer._monitor.load
        assert measured.shape == (controller.table.layers, controller.table.experts)
        skewed = np.ones_like(measured)
        for index in range(controller.table.layers):  # what one host has alone is what is asked for most
            alone = [
                expert
                for expert in range(controller.table.experts)
                if [h for h, _ in controller.table.replicas(controller.table.first_layer + index, expert)]
                == ["expert-host-0"]
            ]
            skewed[index, alone] = 500.0
        controller._observer._monitor._load[:] = 100 * skewed
        plan = controller.change(Wanted(rebalance=True), dry_run=True)
        assert plan.balance_after > plan.balance_before
        assert controller.table.epoch == 1

        def rebalance(count: int) -> None:
            if count == 8:
                assert controller.change(Wanted(rebalance=True)).epoch == 2

        assert tokens(ask(controller, at=rebalance)) == expected
        assert controller.status().balance > 0
        assert tokens(ask(controller)) == expected
    finally:
        controller.stop()


def test_hosts_and_routers_in_one_change(controller: Controller, expected: list[int]) -> None:
    change = controller.change(Wanted(experts=3, routers=3))
    assert change.added == ("expert-host-2", "router-2")
    assert str(change).startswith("added expert-host-2, router-2; moved ")
    assert tokens(ask(controller)) == expected


def test_a_router_that_does_not_start_undoes_its_part(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    def refuse(name: str) -> None:
        if name == "router-2":
            raise MorayError("no such luck")

    spawner.before = refuse
    with pytest.raises(MorayError, match="no such luck"):
        controller.change(Wanted(routers=3))
    eventually(lambda: controller.status().health == "ok")
    assert list(controller.directory().routers) == ["router-0", "router-1"]
    assert tokens(ask(controller)) == expected
