"""The controller with a spawner that makes threads instead of Ray actors: the same hosts and routers, no processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.cluster.controller import Controller
from moray.configs.deployment import Deployment
from moray.configs.errors import CheckpointError, ClusterError, ConfigError
from moray.model.testing import write_random_checkpoint

from .thread_cluster import ThreadHost, ThreadSpawner, ask, deployment, eventually, tokens


@pytest.fixture
def controller(checkpoint: Path, spawner: ThreadSpawner) -> Iterator[Controller]:
    controller = Controller(deployment(checkpoint), spawner)
    controller.start()
    yield controller
    controller.stop()


def test_starts_everything_and_serves(controller: Controller, spawner: ThreadSpawner, expected: list[int]) -> None:
    assert spawner.made == ["expert-host-0", "expert-host-1", "router-0"]
    status = controller.status()
    assert (status.health, status.reason, status.epoch) == ("ok", "", 1)
    assert [(p.id, p.role, p.state, p.node) for p in status.processes] == [
        ("expert-host-0", "expert_host", "ready", "here"),
        ("expert-host-1", "expert_host", "ready", "here"),
        ("router-0", "router", "ready", "here"),
    ]
    assert all(p.data_bytes_read > 0 and p.pid > 0 for p in status.processes)
    assert tokens(ask(controller)) == expected
    assert controller.directory().secret.hex() not in repr(controller.directory())


def test_a_lost_host_is_restored_under_running_requests(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    outputs = ask(controller, at=lambda n: spawner.hosts["expert-host-1"].kill() if n in (3, 20) else None)
    assert tokens(outputs) == expected
    assert outputs[-1].finish_reason == "length"
    assert spawner.made.count("expert-host-1") == 3
    assert spawner.made.count("expert-host-0") == 1
    eventually(lambda: controller.status().health == "ok")


def test_a_lost_router_is_restored_at_another_address(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    before = controller.directory().routers
    spawner.routers["router-0"].kill()
    eventually(lambda: spawner.made.count("router-0") == 2 and controller.status().health == "ok")
    assert controller.directory().routers.keys() == before.keys()
    assert controller.directory().routers != before
    assert tokens(ask(controller)) == expected


def test_a_host_and_a_router_lost_together(controller: Controller, spawner: ThreadSpawner, expected: list[int]) -> None:
    """The router cannot start before the host is back: that must not count as its end."""
    with spawner.changed:
        spawner.routers["router-0"].dead = spawner.hosts["expert-host-0"].dead = True
        spawner.hosts["expert-host-0"].host.stop()
        spawner.changed.notify_all()
    eventually(lambda: len(spawner.made) >= 5 and controller.status().health == "ok")
    assert tokens(ask(controller)) == expected


def test_status_while_a_host_is_away(controller: Controller, spawner: ThreadSpawner) -> None:
    spawner.after_host = lambda host: host.may_load.clear()
    spawner.hosts["expert-host-0"].kill()
    eventually(lambda: controller.status().health == "unavailable")
    assert controller.status().reason == "expert-host-0 is starting: died; being restored"
    eventually(lambda: spawner.made.count("expert-host-0") == 2)
    spawner.hosts["expert-host-0"].may_load.set()
    eventually(lambda: controller.status().health == "ok")
    assert controller.status().reason == ""


def test_without_any_router_nothing_is_served(
    controller: Controller, spawner: ThreadSpawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ClusterError("no node has room")

    spawner.before = refuse
    spawner.routers["router-0"].kill()
    eventually(lambda: controller.status().health == "unavailable")
    eventually(lambda: "no node has room" in controller.status().reason)


def test_one_router_of_two_keeps_serving(checkpoint: Path, spawner: ThreadSpawner) -> None:
    controller = Controller(deployment(checkpoint, routers=2), spawner)
    controller.start()

    def refuse(name: str) -> None:
        raise ClusterError("no node has room")

    spawner.before = refuse
    spawner.routers["router-1"].kill()
    eventually(lambda: controller.status().health == "degraded")
    assert "router-1" in controller.status().reason
    controller.stop()


def test_a_crash_loop_is_slowed_down_and_the_others_are_still_watched(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    sick = True

    def die_at_once(host: ThreadHost) -> None:
        host.dead = host.cannot_load = sick and host.host.host_id == "expert-host-1"

    spawner.after_host = die_at_once
    spawner.hosts["expert-host-1"].kill()
    eventually(lambda: any(p.state == "dead" for p in controller.status().processes))
    eventually(lambda: "times in 60 s; next attempt in" in controller.status().reason)
    assert controller.status().health == "unavailable"
    made = spawner.made.count("expert-host-0")
    spawner.hosts["expert-host-0"].kill()
    eventually(lambda: spawner.made.count("expert-host-0") == made + 1)
    sick = False
    eventually(lambda: controller.status().health == "ok")
    assert tokens(ask(controller)) == expected


def test_a_failing_restore_is_tried_again(controller: Controller, spawner: ThreadSpawner, expected: list[int]) -> None:
    refusals = iter(range(2))

    def refuse_twice(name: str) -> None:
        if next(refusals, None) is not None:
            raise ClusterError("no node has room yet")

    spawner.before = refuse_twice
    spawner.hosts["expert-host-0"].kill()
    eventually(lambda: spawner.made.count("expert-host-0") == 2 and controller.status().health == "ok")
    assert tokens(ask(controller)) == expected


def test_a_start_that_fails_leaves_nothing(checkpoint: Path, spawner: ThreadSpawner) -> None:
    before = set(threading.enumerate())

    def refuse(name: str) -> None:
        if name == "router-0":
            raise ClusterError("no node has room")

    spawner.before = refuse
    controller = Controller(deployment(checkpoint), spawner)
    with pytest.raises(ClusterError, match="no node has room"):
        controller.start()
    assert spawner.made == ["expert-host-0", "expert-host-1"]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"experts": {"hosts": 9}}, ConfigError),
        ({"max_context": 4096}, ConfigError),
        ({"model": "/nowhere"}, ConfigError),
    ],
    ids=["too-many-hosts", "context", "no-model"],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    checkpoint: Path, spawner: ThreadSpawner, settings: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        Controller(Deployment.from_dict({"model": str(checkpoint), **settings}), spawner).start()
    assert spawner.made == []


def test_a_damaged_checkpoint_is_refused_before_anything_starts(tmp_path: Path, spawner: ThreadSpawner) -> None:
    path = write_random_checkpoint(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Controller(deployment(path), spawner).start()
    assert spawner.made == []


def test_stop_ends_everything_and_restores_nothing(checkpoint: Path, spawner: ThreadSpawner) -> None:
    before = set(threading.enumerate())
    controller = Controller(deployment(checkpoint, hosts=3, routers=2), spawner)
    controller.start()
    controller.stop()
    controller.stop()
    made = list(spawner.made)
    spawner.hosts["expert-host-0"].kill()
    assert spawner.made == made
    give_up = time.monotonic() + 10
    while not set(threading.enumerate()) <= before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
