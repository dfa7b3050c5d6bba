"""Processes that stand still, warm ones that take a lost one's place, and clusters without room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.cluster import supervisor as supervisor_module
from moray.cluster.changes import Wanted
from moray.cluster.controller import Controller
from moray.cluster.spawning import NoRoomError
from moray.configs.errors import ClusterError

from .thread_cluster import ThreadSpawner, ask, deployment, eventually, tokens


@pytest.fixture
def start(spawner: ThreadSpawner, checkpoint: Path) -> Iterator[Callable[..., Controller]]:
    started: list[Controller] = []

    def make(**settings: Any) -> Controller:
        controller = Controller(deployment(checkpoint, **settings), spawner)
        started.append(controller)
        controller.start()
        return controller

    yield make
    for controller in started:
        controller.stop()


def state(controller: Controller, name: str) -> str:
    return next(p.state for p in controller.status().processes if p.id == name)


def happened(controller: Controller) -> list[str]:
    return [event.what for event in controller.status().events]


def test_a_silent_host_is_reported_and_heard_again(start: Callable[..., Controller], spawner: ThreadSpawner) -> None:
    controller = start(hosts=3, min_replicas=2)
    host = spawner.hosts["expert-host-1"]
    host.silent = True
    eventually(lambda: state(controller, "expert-host-1") == "stuck")
    status = controller.status()
    assert (status.health, status.missing_replicas > 0) == ("degraded", True)
    assert "expert-host-1 is stuck: has not answered for" in status.reason
    host.silent = False
    eventually(lambda: controller.status().health == "ok")
    assert spawner.made.count("expert-host-1") == 1
    assert [what for what in happened(controller) if what in ("stuck", "answers_again")] == ["stuck", "answers_again"]


def test_a_pause_before_the_next_attempt_holds_when_another_host_dies(
    start: Callable[..., Controller], spawner: ThreadSpawner, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    monkeypatch.setattr(supervisor_module, "_PAUSES_S", (1000.0, 1000.0))
    controller = start(hosts=3, min_replicas=2)

    def refuse(name: str) -> None:
        if name == "expert-host-1":
            raise ClusterError("no luck")

    spawner.before = refuse
    spawner.hosts["expert-host-1"].kill()
    eventually(lambda: state(controller, "expert-host-1") == "dead")
    attempts = happened(controller).count("not_restored")
    spawner.hosts["expert-host-2"].kill()
    eventually(lambda: spawner.made.count("expert-host-2") == 2 and state(controller, "expert-host-2") == "ready")
    assert happened(controller).count("not_restored") == attempts
    assert state(controller, "expert-host-1") == "dead"
    assert tokens(ask(controller)) == expected


def test_what_nobody_expected_does_not_end_supervision(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    """Errors that are not ours, once in a restoration and once in a round of reports."""
    controller = start(hosts=2)
    surprises = iter([RuntimeError("a surprise")])

    def surprise(name: str) -> None:
        if (error := next(surprises, None)) is not None:
            raise error

    spawner.before = surprise
    spawner.hosts["expert-host-1"].kill()
    eventually(lambda: "restored" in happened(controller))
    assert "not_restored" in happened(controller)
    rounds = iter([RuntimeError("another")])
    tick = controller._supervisor._tick  # type: ignore[union-attr]  # it was started

    def failing_once() -> None:
        if (error := next(rounds, None)) is not None:
            raise error
        tick()

    controller._supervisor._tick = failing_once  # type: ignore[union-attr]
    eventually(lambda: "round_failed" in happened(controller))
    spawner.hosts["expert-host-0"].silent = True
    eventually(lambda: "stuck" in happened(controller))
    eventually(lambda: controller.status().health == "ok")
    assert tokens(ask(controller)) == expected


@pytest.mark.parametrize("name", ["expert-host-1", "router-1"])
def test_one_that_stays_silent_is_replaced(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int], name: str
) -> None:
    controller = start(hosts=2, routers=2)
    old = (spawner.hosts | spawner.routers)[name]
    old.silent = True
    eventually(lambda: spawner.made.count(name) == 2 and controller.status().health == "ok")
    assert old.dead, "it was ended first: what is only slow must not come back"
    eventually(lambda: {"stuck", "given_up", "restored"} <= set(happened(controller)))
    assert tokens(ask(controller)) == expected


def test_a_warm_process_takes_a_lost_ones_place(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = start(hosts=2, standby=1)
    eventually(lambda: "standby" in [p.state for p in controller.status().processes])
    warm = next(p for p in controller.status().processes if p.state == "standby")
    outputs = ask(controller, at=lambda count: spawner.hosts["expert-host-1"].kill() if count == 6 else None)
    assert tokens(outputs) == expected
    # The answer may be over before anybody has missed the host.
    eventually(lambda: ("expert-host-1", warm.pid) in [(p.id, p.pid) for p in controller.status().processes])
    eventually(lambda: controller.status().health == "ok")
    assert spawner.made.count("expert-host-1") == 1
    eventually(lambda: "standby" in [p.state for p in controller.status().processes])
    assert spawner.made.count("standby") == 2


def test_a_warm_process_is_used_to_grow(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = start(hosts=2, standby=1)
    spawner.room = 1
    assert controller.change(Wanted(experts=4)).added == ("expert-host-2", "expert-host-3")
    assert spawner.made.count("expert-host-2") + spawner.made.count("expert-host-3") == 1
    assert tokens(ask(controller)) == expected


def test_the_others_take_over_where_there_is_no_room_and_it_comes_back_with_the_room(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = start(hosts=3)

    def refuse(name: str) -> None:
        if spawner.room == 0:
            raise NoRoomError(f"{name} needs 1 more CPU")

    spawner.before, spawner.room = refuse, 0
    outputs = ask(controller, at=lambda count: spawner.hosts["expert-host-2"].kill() if count == 6 else None)
    assert tokens(outputs) == expected
    eventually(lambda: list(controller.table.slots) == ["expert-host-0", "expert-host-1"])
    assert "went_on_without" in happened(controller)
    assert controller.status().health == "ok"
    spawner.room = 10
    eventually(lambda: len(controller.table.slots) == 3)
    assert tokens(ask(controller)) == expected


def test_a_router_that_misses_a_host_is_told_where_it_is(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word that a host is back can be lost: what a router reports brings it again."""
    controller = start(hosts=2)
    router = spawner.routers["router-0"]
    real = router.relink
    lost: list[str] = []

    def lose_once(host_id: str, addresses: Any) -> None:
        if not lost:
            lost.append(host_id)
            return
        real(host_id, addresses)

    monkeypatch.setattr(router, "relink", lose_once)
    spawner.hosts["expert-host-1"].kill()
    eventually(lambda: lost == ["expert-host-1"])
    assert tokens(ask(controller)) == expected
