"""The placement changes while requests run: hosts come and go, and no token differs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from moray.cluster.changes import Change, Wanted
from moray.cluster.controller import Controller
from moray.configs.errors import ClusterError, ConfigError
from moray.model.config import ModelConfig

from .thread_cluster import ThreadHost, ThreadSpawner, ask, deployment, eventually, tokens


def at_tokens(actions: dict[int, Callable[[], object]]) -> Callable[[int], None]:
    """Each of them once so many tokens are there: a message may bring several."""
    left = dict(sorted(actions.items()))

    def at(count: int) -> None:
        for least in [least for least in left if least <= count]:
            left.pop(least)()

    return at


def assert_true(value: bool) -> None:
    assert value


def epochs(spawner: ThreadSpawner, name: str) -> list[int]:
    return list(spawner.hosts[name].host.report().epochs)


def test_up_and_down_under_running_requests(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    """Requests follow each other until all changes are made: some run while each is, and while the next one begins."""
    changes: list[Change] = []

    def scale() -> None:
        for hosts in (5, 3, 1):
            changes.append(controller.change(Wanted(experts=hosts)))

    scaling = threading.Thread(target=scale)
    scaling.start()
    while scaling.is_alive():
        assert tokens(ask(controller)) == expected
    scaling.join()
    assert [change.epoch for change in changes] == [2, 3, 4]
    assert changes[0].added == ("expert-host-2", "expert-host-3", "expert-host-4")
    assert changes[1].removed == ("expert-host-3", "expert-host-4")
    assert changes[2].removed == ("expert-host-1", "expert-host-2")
    status = controller.status()
    assert (status.health, status.epoch) == ("ok", 4)
    assert [p.id for p in status.processes] == ["expert-host-0", "router-0", "router-1"]
    assert epochs(spawner, "expert-host-0") == [4]
    assert all(spawner.hosts[f"expert-host-{i}"].host._stopping.is_set() for i in range(1, 5))
    assert tokens(ask(controller)) == expected


@pytest.mark.parametrize("copying", [True, False])
def test_a_host_gets_only_what_it_did_not_hold(checkpoint: Path, spawner: ThreadSpawner, copying: bool) -> None:
    controller = Controller(deployment(checkpoint, copy_weights=copying), spawner)
    controller.start()
    before = {p.id: p for p in controller.status().processes}
    config = ModelConfig.load(checkpoint)
    one_expert = before["expert-host-0"].data_bytes_read // (len(config.moe_layers) * config.n_routed_experts // 2)
    change = controller.change(Wanted(experts=3))
    after = controller.status().processes
    read = sum(p.data_bytes_read for p in after) - sum(p.data_bytes_read for p in before.values())
    copied = sum(p.data_bytes_copied for p in after)
    controller.stop()
    assert read + copied == change.moved * one_expert
    assert (copied > 0) == copying
    assert change.moved < change.total


def test_a_dry_run_changes_nothing(controller: Controller, spawner: ThreadSpawner) -> None:
    made = list(spawner.made)
    plan = controller.change(Wanted(experts=3), dry_run=True)
    assert (plan.added, plan.removed, plan.seconds) == (("expert-host-2",), (), 0.0)
    assert spawner.made == made
    assert controller.table.epoch == 1
    assert controller.change(Wanted(experts=2)) == Change(1, total=plan.total)
    assert controller.table.epoch == 1


@pytest.mark.parametrize(("hosts", "message"), [(0, "at least one"), (9, "at most 8 hosts")])
def test_what_cannot_be_is_refused(controller: Controller, hosts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        controller.change(Wanted(experts=hosts))


def test_no_room(controller: Controller, spawner: ThreadSpawner) -> None:
    spawner.room = 2
    with pytest.raises(ClusterError, match="1 more CPUs"):
        controller.change(Wanted(experts=5))
    assert [p.id for p in controller.status().processes if p.role == "expert_host"] == [
        "expert-host-0",
        "expert-host-1",
    ]


def test_a_host_that_dies_while_it_loads_undoes_the_change(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    def die(host: ThreadHost) -> None:
        host.cannot_load = host.host.host_id == "expert-host-3"

    def try_it() -> None:
        with pytest.raises(ClusterError, match="expert-host-3: is dead"):
            controller.change(Wanted(experts=5))

    spawner.after_host = die
    assert tokens(ask(controller, at=at_tokens({5: try_it}))) == expected
    status = controller.status()
    assert (status.health, status.epoch) == ("ok", 1)
    assert [p.id for p in status.processes] == ["expert-host-0", "expert-host-1", "router-0", "router-1"]
    assert epochs(spawner, "expert-host-0") == [1]
    assert not spawner.hosts["expert-host-0"].loading, "a load that ends later would be held on to"
    spawner.after_host = lambda host: None
    assert controller.change(Wanted(experts=3)).epoch == 2


def test_a_host_that_dies_meanwhile_is_restored_before_the_change_goes_on(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    """What is lost comes first: the change gives way, and is planned anew."""

    def kill_another(host: ThreadHost) -> None:
        spawner.after_host = lambda host: None
        spawner.hosts["expert-host-0"].kill()

    def change() -> None:
        spawner.after_host = kill_another
        assert controller.change(Wanted(experts=3)).added == ("expert-host-2",)

    assert tokens(ask(controller, at=at_tokens({5: change}))) == expected
    assert spawner.made.count("expert-host-0") == 2
    assert spawner.made.count("expert-host-2") == 2
    assert "gave_way" in [event.what for event in controller.status().events]
    assert (controller.status().health, controller.table.epoch) == ("ok", 2)
    assert all(epochs(spawner, name) == [2] for name in controller.table.slots)
    assert tokens(ask(controller)) == expected


def test_a_router_that_cannot_change_over_is_started_again(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    router = spawner.routers["router-1"]
    router.silent = True
    assert controller.change(Wanted(experts=4)).epoch == 2
    eventually(lambda: spawner.made.count("router-1") == 2 and controller.status().health == "ok")
    assert tokens(ask(controller)) == expected


def test_with_two_replicas_a_death_costs_no_pause(
    checkpoint: Path, spawner: ThreadSpawner, expected: list[int]
) -> None:
    """The other replica takes over within the step: tokens go on while the host is still away."""
    controller = Controller(deployment(checkpoint, hosts=3, min_replicas=2), spawner)
    controller.start()
    come_back = threading.Event()
    seen: list[str] = []

    def kill() -> None:
        spawner.before = lambda name: assert_true(come_back.wait(30))
        spawner.hosts["expert-host-1"].kill()

    def look() -> None:
        eventually(lambda: controller.status().health == "degraded")
        seen.append(controller.status().reason)
        come_back.set()

    try:
        assert tokens(ask(controller, at=at_tokens({4: kill, 30: look}))) == expected
        assert "expert-host-1 is starting" in seen[0]
        eventually(lambda: controller.status().health == "ok")
        change = controller.change(Wanted(experts=4))
        assert change.added == ("expert-host-3",)
        assert tokens(ask(controller)) == expected
        held = [len(layer) for layers in controller.table.slots.values() for layer in layers]
        assert sum(held) == 2 * change.total
        with pytest.raises(ConfigError, match="min_replicas = 2: copies of an expert are on distinct hosts"):
            controller.change(Wanted(experts=1))
    finally:
        come_back.set()
        controller.stop()
