"""The placement changes while requests run: hosts come and go, and no token differs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moray.cluster import controller as controller_module
from moray.cluster.controller import Change, Controller
from moray.cluster.local import LLM
from moray.configs.errors import ClusterError, ConfigError
from moray.model.testing import write_random_checkpoint

from .thread_cluster import PROMPT, ThreadHost, ThreadSpawner, ask, deployment, eventually, tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), dtype="fp8", seed=8)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    with LLM(checkpoint, experts=1) as llm:
        return llm.generate([PROMPT], max_tokens=40, temperature=0.0, ignore_eos=True)[0].token_ids


@pytest.fixture
def spawner(monkeypatch: pytest.MonkeyPatch) -> ThreadSpawner:
    monkeypatch.setattr(controller_module, "_POLL_S", 0.05)
    return ThreadSpawner()


@pytest.fixture
def controller(checkpoint: Path, spawner: ThreadSpawner) -> Iterator[Controller]:
    controller = Controller(deployment(checkpoint, routers=2), spawner)
    controller.start()
    yield controller
    controller.stop()


def at_tokens(actions: dict[int, Callable[[], object]]) -> Callable[[int], None]:
    return lambda count: None if count not in actions else (actions[count](), None)[1]


def assert_true(value: bool) -> None:
    assert value


def epochs(spawner: ThreadSpawner, name: str) -> list[int]:
    return list(spawner.hosts[name].host._epochs)


def test_up_and_down_under_a_running_request(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    changes: list[Change] = []

    def scale_to(hosts: int) -> Callable[[], object]:
        return lambda: changes.append(controller.scale_experts(hosts))

    steps = {4: scale_to(5), 16: scale_to(3), 28: scale_to(1)}
    assert tokens(ask(controller, at=at_tokens(steps))) == expected
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


def test_a_host_reads_only_what_it_did_not_hold(controller: Controller, checkpoint: Path) -> None:
    before = {p.id: p.data_bytes_read for p in controller.status().processes}
    config = controller._config
    one_expert = before["expert-host-0"] // (len(config.moe_layers) * config.n_routed_experts // 2)
    change = controller.scale_experts(3)
    after = {p.id: p.data_bytes_read for p in controller.status().processes}
    read = sum(after[name] - before.get(name, 0) for name in after)
    assert read == change.moved * one_expert
    assert change.moved < change.total


def test_a_dry_run_changes_nothing(controller: Controller, spawner: ThreadSpawner) -> None:
    made = list(spawner.made)
    plan = controller.scale_experts(3, dry_run=True)
    assert (plan.added, plan.removed, plan.seconds) == (("expert-host-2",), (), 0.0)
    assert spawner.made == made
    assert controller.table.epoch == 1
    assert controller.scale_experts(2) == Change(2, (), (), 0, plan.total)
    assert controller.table.epoch == 1


@pytest.mark.parametrize(("hosts", "message"), [(0, "at least one"), (9, "at most 8 hosts")])
def test_what_cannot_be_is_refused(controller: Controller, hosts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        controller.scale_experts(hosts)


def test_no_room(controller: Controller, spawner: ThreadSpawner) -> None:
    spawner.room = 2
    with pytest.raises(ClusterError, match="1 more CPUs"):
        controller.scale_experts(5)
    assert [p.id for p in controller.status().processes if p.role == "expert_host"] == [
        "expert-host-0",
        "expert-host-1",
    ]


def test_a_host_that_dies_while_it_loads_undoes_the_change(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    def die(host: ThreadHost) -> None:
        host.cannot_load = host.name == "expert-host-3"

    def try_it() -> None:
        with pytest.raises(ClusterError, match="expert-host-3: is dead"):
            controller.scale_experts(5)

    spawner.after_host = die
    assert tokens(ask(controller, at=at_tokens({5: try_it}))) == expected
    status = controller.status()
    assert (status.health, status.epoch) == ("ok", 1)
    assert [p.id for p in status.processes] == ["expert-host-0", "expert-host-1", "router-0", "router-1"]
    assert epochs(spawner, "expert-host-0") == [1]
    assert not spawner.hosts["expert-host-0"].loading, "a load that ends later would be held on to"
    spawner.after_host = lambda host: None
    assert controller.scale_experts(3).epoch == 2


def test_a_host_that_dies_before_the_change_over_is_restored_after(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    """Held by the lock of the change, the supervisor restores it with the table that is in force then."""
    loading = threading.Event()

    def hold(host: ThreadHost) -> None:
        loading.set()
        spawner.hosts["expert-host-0"].kill()

    def change() -> None:
        spawner.after_host = hold
        with pytest.raises(ClusterError, match="expert-host-0: is dead"):
            controller.scale_experts(3)
        spawner.after_host = lambda host: None

    assert tokens(ask(controller, at=at_tokens({5: change}))) == expected
    assert loading.is_set()
    eventually(lambda: controller.status().health == "ok")
    assert spawner.made.count("expert-host-0") == 2
    assert controller.scale_experts(3).epoch == 2
    assert tokens(ask(controller)) == expected


def test_a_router_that_cannot_change_over_is_started_again(
    controller: Controller, spawner: ThreadSpawner, expected: list[int]
) -> None:
    router = spawner.routers["router-1"]
    router.dead = True  # it no longer answers; the supervisor finds it once it may look
    assert controller.scale_experts(4).epoch == 2
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
        change = controller.scale_experts(4)
        assert change.added == ("expert-host-3",)
        assert tokens(ask(controller)) == expected
        held = [len(layer) for layers in controller.table.slots.values() for layer in layers]
        assert sum(held) == 2 * change.total
        with pytest.raises(ConfigError, match="min_replicas = 2: copies of an expert are on distinct hosts"):
            controller.scale_experts(1)
    finally:
        come_back.set()
        controller.stop()
