"""The controller dies and another one takes over: what runs goes on, what was half done is undone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moray.actors.links import LinkAddress
from moray.actors.placement_table import PlacementTable
from moray.cluster.changes import Wanted
from moray.cluster.controller import Controller
from moray.cluster.ledger import KeptProcess, MemoryLedger, Record
from moray.configs.deployment import Deployment
from moray.configs.errors import ClusterError
from moray.model.testing import write_random_checkpoint

from .thread_cluster import ThreadHost, ThreadSpawner, ask, deployment, eventually, tokens


class Cluster:
    """Controllers, one after the other, of one cluster."""

    def __init__(self, described: Deployment, spawner: ThreadSpawner) -> None:
        self.described, self.spawner = described, spawner
        self.ledger = MemoryLedger()
        self.controller = Controller(described, spawner, self.ledger)
        self.controller.start()

    def lose_controller(self) -> None:
        """As a SIGKILL does: nothing is told to anybody."""
        self.controller.leave()

    def replace_controller(self) -> Controller:
        self.controller = Controller(self.described, self.spawner, self.ledger)
        self.controller.start()
        return self.controller


@pytest.fixture
def start(spawner: ThreadSpawner, checkpoint: Path) -> Iterator[Callable[..., Cluster]]:
    started: list[Cluster] = []

    def make(**settings: int) -> Cluster:
        started.append(Cluster(deployment(checkpoint, **settings), spawner))
        return started[-1]

    yield make
    for cluster in started:
        cluster.controller.stop()


def test_a_request_goes_on_and_nothing_is_started_again(
    start: Callable[..., Cluster], spawner: ThreadSpawner, expected: list[int]
) -> None:
    cluster = start(routers=2)
    before = cluster.controller.directory()
    made = list(spawner.made)
    eventually(lambda: all(process.instructions for process in cluster.controller.status().processes))
    processes = cluster.controller.status().processes

    def restart() -> None:
        cluster.lose_controller()
        cluster.replace_controller()

    outputs = ask(cluster.controller, at=lambda count: restart() if count == 10 else None)
    assert tokens(outputs) == expected
    assert spawner.made == made
    after = cluster.controller.directory()
    assert (after.routers, after.secret) == (before.routers, before.secret)
    assert cluster.controller.status().health == "ok"
    eventually(lambda: sorted(map(str, cluster.controller.status().processes)) == sorted(map(str, processes)))
    assert "took_over" in [event.what for event in cluster.controller.status().events]
    assert cluster.controller.change(Wanted(experts=3)).epoch == 2
    assert tokens(ask(cluster.controller)) == expected


def test_drafting_goes_on_though_there_are_gpus_now(
    tmp_path: Path, spawner: ThreadSpawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(deployment(write_random_checkpoint(tmp_path / "mtp", seed=8, mtp=True)), spawner)
    try:
        answer = tokens(ask(cluster.controller))
        cluster.lose_controller()
        monkeypatch.setattr(spawner, "gpus", lambda deployment: 1.0)
        cluster.replace_controller()
        assert cluster.controller.change(Wanted(experts=3)).epoch == 2
        assert tokens(ask(cluster.controller)) == answer
    finally:
        cluster.controller.stop()


def test_what_died_meanwhile_is_restored(
    start: Callable[..., Cluster], spawner: ThreadSpawner, expected: list[int]
) -> None:
    cluster = start(routers=2)
    cluster.lose_controller()
    spawner.hosts["expert-host-1"].kill()
    spawner.routers["router-0"].kill()
    controller = cluster.replace_controller()
    eventually(lambda: controller.status().health == "ok")
    assert spawner.made.count("expert-host-1") == spawner.made.count("router-0") == 2
    assert spawner.made.count("expert-host-0") == spawner.made.count("router-1") == 1
    assert tokens(ask(controller)) == expected


def test_a_change_that_was_going_on_is_undone(
    start: Callable[..., Cluster], spawner: ThreadSpawner, expected: list[int]
) -> None:
    cluster = start()
    loading = threading.Event()

    def hold(host: ThreadHost) -> None:
        host.may_load.clear()
        loading.set()

    spawner.after_host = hold

    def scale() -> None:
        with pytest.raises(ClusterError):
            cluster.controller.change(Wanted(experts=3))

    change = threading.Thread(target=scale)
    change.start()
    assert loading.wait(20)
    eventually(lambda: "expert-host-2" in [p.name for p in _record(cluster).processes if p.addresses])
    kept = cluster.ledger.read()
    assert kept is not None
    cluster.lose_controller()
    change.join(20)
    cluster.ledger.write(kept)  # a controller that was killed could not tidy up
    spawner.after_host = lambda host: None
    controller = cluster.replace_controller()
    assert controller.status().health == "ok"
    assert (controller.table.epoch, list(controller.table.slots)) == (1, ["expert-host-0", "expert-host-1"])
    assert all(spawner.hosts[name].host.report().epochs == (1,) for name in controller.table.slots)
    assert spawner.hosts["expert-host-2"].host._stopping.is_set()
    assert tokens(ask(controller)) == expected


def test_a_router_that_missed_the_change_over_is_brought_up_to_date(
    start: Callable[..., Cluster], spawner: ThreadSpawner, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller dies between writing the table and telling the routers."""
    cluster = start(routers=2)
    monkeypatch.setattr(cluster.controller._transition, "bring_routers_up_to_date", lambda: None)
    monkeypatch.setattr(cluster.controller._transition, "_retire", lambda table: None)
    cluster.controller.change(Wanted(experts=3))
    cluster.lose_controller()
    for router in spawner.routers.values():
        assert router.router is not None
        assert router.router.report().epoch == 1
    controller = cluster.replace_controller()
    for router in spawner.routers.values():
        assert router.router is not None
        assert router.router.report().epoch == 2
    assert controller.table.epoch == 2
    assert all(spawner.hosts[name].host.report().epochs == (2,) for name in controller.table.slots)
    assert tokens(ask(controller)) == expected


def test_another_deployment_replaces_it(
    start: Callable[..., Cluster], spawner: ThreadSpawner, checkpoint: Path, expected: list[int]
) -> None:
    cluster = start()
    cluster.lose_controller()
    first = spawner.hosts["expert-host-0"]
    cluster.described = deployment(checkpoint, hosts=3)
    controller = cluster.replace_controller()
    assert first.host._stopping.is_set()
    assert list(controller.table.slots) == ["expert-host-0", "expert-host-1", "expert-host-2"]
    assert tokens(ask(controller)) == expected


def test_one_that_was_superseded_ends_nothing(start: Callable[..., Cluster], expected: list[int]) -> None:
    cluster = start()
    old = cluster.controller
    cluster.lose_controller()
    controller = cluster.replace_controller()
    old.stop()
    assert controller.status().health == "ok"
    assert tokens(ask(controller)) == expected


def test_the_end_leaves_no_record(start: Callable[..., Cluster]) -> None:
    cluster = start()
    assert cluster.ledger.read() is not None
    cluster.controller.stop()
    assert cluster.ledger.read() is None


def test_a_record_comes_back_as_it_was_written() -> None:
    record = Record(
        generation=3,
        deployment={"model": "tiny-r1", "experts": {"hosts": 2}},
        secret=b"\x00\xff",
        table=PlacementTable(7, 1, 2, {"expert-host-0": ((0, 1), (1, -1))}),
        replicas={(1, 0): 2},
        wanted_hosts=2,
        wanted_cold=1,
        processes=(
            KeptProcess("expert-host-0", "expert_host", "a.1", addresses=(LinkAddress("shm", "x", "machine"),)),
            KeptProcess("router-0", "router", "b.2", address="127.0.0.1:1"),
        ),
        standby=("c.3",),
    )
    assert Record.unpack(record.pack()) == record
    assert "xff" not in repr(record)


def _record(cluster: Cluster) -> Record:
    record = cluster.ledger.read()
    assert record is not None
    return record
