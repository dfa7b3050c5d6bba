"""Processes that stand still, warm ones that take a lost one's place, and clusters without room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.cluster.changes import Wanted
from moray.cluster.controller import Controller
from moray.cluster.spawning import NoRoomError

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
    eventually(lambda: controller.status().health == "ok")
    assert next(p.pid for p in controller.status().processes if p.id == "expert-host-1") == warm.pid
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
