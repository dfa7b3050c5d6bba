"""A start on a cluster whose nodes are still to come: it says what it waits for, and goes on when they are there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from moray.cluster import launching
from moray.cluster.controller import Controller
from moray.configs.errors import ClusterError

from .thread_cluster import ThreadHost, ThreadSpawner, ask, deployment, eventually, tokens


def arriving(when: threading.Event) -> Callable[[ThreadHost], None]:
    """Hosts that come up when the event is set."""

    def make(host: ThreadHost) -> None:
        pid, host.pid = host.pid, 0

        def locate(timeout_s: float = 0.0) -> None:
            if not when.wait(0.01):
                raise ClusterError(f"{host.actor_name}: where: no answer")
            host.pid = pid

        host.locate = locate  # type: ignore[method-assign]

    return make


@pytest.fixture(autouse=True)
def asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_ASK_AFTER_S", 0.0)


def test_a_start_waits_for_nodes_and_says_so_once(
    spawner: ThreadSpawner, checkpoint: Path, expected: list[int]
) -> None:
    nodes = threading.Event()
    spawner.after_host, spawner.room = arriving(nodes), 0
    controller = Controller(deployment(checkpoint, cold={"hosts": 1, "slots": 2}), spawner)
    controller.check()
    starting = threading.Thread(target=controller.start)
    starting.start()
    try:
        eventually(lambda: bool(controller.status().events))
        nodes.set()
        starting.join(30)
        assert tokens(ask(controller)) == expected
        waits = [event for event in controller.status().events if event.what == "waits_for_room"]
        assert [(event.subject, event.detail) for event in waits] == [
            ("expert-host-0,expert-host-1,cold-host-0", "3 more CPUs")
        ]
    finally:
        nodes.set()
        starting.join(30)
        controller.stop()


def test_a_start_waits_for_no_process_that_has_ended(spawner: ThreadSpawner, checkpoint: Path) -> None:
    def ended(host: ThreadHost) -> None:
        arriving(threading.Event())(host)
        host.dead = True

    spawner.after_host = ended
    with pytest.raises(ClusterError, match="where: no answer"):
        Controller(deployment(checkpoint), spawner).start()


def test_a_start_does_not_wait_for_ever(
    spawner: ThreadSpawner, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_NODES_S", 0.05)
    spawner.after_host, spawner.room = arriving(threading.Event()), 0
    with pytest.raises(ClusterError, match="expert-host-0,expert-host-1: not come up within 0 s: 2 more CPUs"):
        Controller(deployment(checkpoint), spawner).start()
