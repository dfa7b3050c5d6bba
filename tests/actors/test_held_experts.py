"""Loads that wait for each other, and what becomes of them when epochs are retired or abandoned meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from moray.actors import expert_loading
from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.weight_copy import tensors_of
from moray.configs.errors import CheckpointError, ClusterError
from moray.model.compute import Compute
from moray.model.reader import BytesRead
from moray.model.testing import write_random_checkpoint

Slots = Sequence[Sequence[int]]


class Disk:
    """Stands in for `os.preadv`: while `go` is clear, whoever reads waits; `asked` says that somebody does."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.asked = threading.Event()
        self.error: OSError | None = None
        self._real = os.preadv

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not self.go.is_set():
            self.asked.set()
            assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return self._real(descriptor, buffers, offset)

    def hold(self) -> None:
        self.asked.clear()
        self.go.clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("held"), seed=9)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "preadv", disk)
    monkeypatch.setattr(expert_loading, "_JOIN_S", 0.01)  # a read that waits here ends later, and is not waited for
    return disk


@pytest.fixture
def host() -> Iterator[ExpertHost]:
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    yield host
    host.stop()


Begin = Callable[[Slots, int], "Future[BytesRead]"]


@pytest.fixture
def begin(host: ExpertHost, checkpoint: Path, disk: Disk) -> Iterator[Begin]:
    """Starts a load in a thread of its own; returns once the host knows of it."""
    pool = ThreadPoolExecutor(4)

    def begin(slots: Slots, epoch: int) -> Future[BytesRead]:
        before = len(host._held._loads)
        loading = pool.submit(host.load, checkpoint, slots, epoch=epoch)
        deadline = Deadline.after(20)
        with host._held._changed:
            while len(host._held._loads) == before and not loading.done() and not deadline.passed:
                host._held._changed.wait(0.01)
        return loading

    yield begin
    disk.go.set()
    pool.shutdown()


def experts(host: ExpertHost, epoch: int) -> dict[int, list[int]]:
    """Slots by layer, that hold something."""
    return {layer: list(host._held.layer(epoch, layer)) for layer in (1, 2)}


def test_a_second_load_waits_for_the_first_and_uses_what_it_read(host: ExpertHost, disk: Disk, begin: Begin) -> None:
    disk.hold()
    first = begin(((0, 1), (2,)), 1)
    assert disk.asked.wait(20)
    second = begin(((1, 3), (2,)), 2)
    assert not first.done()
    assert not second.done()
    disk.go.set()
    assert first.result(20).data == 3 * second.result(20).data > 0
    assert host.report().epochs == (1, 2)
    assert host._held.layer(1, 1)[1] is host._held.layer(2, 1)[0]
    assert experts(host, 2) == {1: [0, 1], 2: [0]}


def test_what_is_retired_during_a_load_stays_retired(
    host: ExpertHost, checkpoint: Path, disk: Disk, begin: Begin
) -> None:
    """The load goes on with the experts it had found in an epoch that is gone now, and brings that epoch not back."""
    host.load(checkpoint, ((0,), ()), epoch=1)
    host.load(checkpoint, ((1,), ()), epoch=2)
    kept = host._held.layer(1, 1)[0]
    disk.hold()
    loading = begin(((0, 1, 2), ()), 3)
    assert disk.asked.wait(20)
    host.retire(2)
    assert host.report().epochs == (2,)
    disk.go.set()
    loading.result(20)
    assert host.report().epochs == (2, 3)
    assert host._held.layer(3, 1)[0] is kept


@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
@pytest.mark.parametrize("how", ["abandon", "retire a later one"])
def test_a_load_that_nobody_wants_any_more_ends_and_changes_nothing(
    host: ExpertHost, checkpoint: Path, disk: Disk, begin: Begin, how: str, running: bool
) -> None:
    host.load(checkpoint, ((0,), ()), epoch=4)
    before = host.report()
    disk.hold()
    first = begin(((0, 1), ()), 3 if running else 5)
    assert disk.asked.wait(20)
    loading = first if running else begin(((0, 2), ()), 3)
    reason = {"abandon": "it was abandoned", "retire a later one": "epoch 4 is served alone"}[how]
    (host.abandon if how == "abandon" else host.retire)(3 if how == "abandon" else 4)
    with pytest.raises(ClusterError, match=f"loading epoch 3 was given up: {reason}"):
        loading.result(20)  # though the disk gives nothing yet
    assert host.report() == before
    disk.go.set()
    if not running:
        first.result(20)
    assert host.report().epochs == ((4,) if running else (4, 5))


def test_a_load_that_is_abandoned_with_everything_read_changes_nothing(
    host: ExpertHost, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment: what was read is about to be served."""
    host.load(checkpoint, ((0,), ()), epoch=1)
    add = host._held.add

    def late(*args: object) -> None:
        host.abandon(2)
        add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(host._held, "add", late)
    with pytest.raises(ClusterError, match="loading epoch 2 was given up"):
        host.load(checkpoint, ((0, 1), ()), epoch=2)
    assert host.report().epochs == (1,)


def test_a_host_that_stops_ends_its_loads(host: ExpertHost, disk: Disk, begin: Begin) -> None:
    disk.hold()
    loads = [begin(((0, 1), ()), epoch) for epoch in (1, 2)]
    assert disk.asked.wait(20)
    host.stop()
    for loading in loads:
        with pytest.raises(ClusterError, match="was given up: its host stops"):
            loading.result(20)


def test_an_abandoned_epoch_can_be_loaded_anew(host: ExpertHost, checkpoint: Path, disk: Disk, begin: Begin) -> None:
    disk.hold()
    first = begin(((0, 1), ()), 2)
    assert disk.asked.wait(20)
    host.abandon(2)
    second = begin(((3,), ()), 2)
    with pytest.raises(ClusterError, match="given up"):
        first.result(20)
    disk.go.set()
    second.result(20)
    assert host.report().epochs == (2,)
    assert experts(host, 2) == {1: [0], 2: []}


def test_abandoning_drops_that_epoch_alone(host: ExpertHost, checkpoint: Path) -> None:
    for epoch, expert in ((1, 0), (2, 1), (3, 2)):
        host.load(checkpoint, ((expert,), ()), epoch=epoch)
    one = host.report().resident_bytes // 3
    host.abandon(2)
    assert host.report().epochs == (1, 3)
    assert host.report().resident_bytes == 2 * one
    host.abandon(7)
    assert host.report().epochs == (1, 3)


def test_a_failed_load_leaves_the_turn_to_the_next(
    host: ExpertHost, checkpoint: Path, disk: Disk, begin: Begin
) -> None:
    disk.hold()
    disk.error = OSError(5, "Input/output error")
    first = begin(((0, 1), ()), 1)
    assert disk.asked.wait(20)
    disk.go.set()
    with pytest.raises(CheckpointError, match="Input/output error"):
        first.result(20)
    disk.error = None
    host.load(checkpoint, ((0, 1), ()), epoch=2)
    assert host.report().epochs == (2,)


def test_a_load_for_an_epoch_that_is_served_replaces_it(host: ExpertHost, checkpoint: Path) -> None:
    host.load(checkpoint, ((0, 1), ()), epoch=1)
    kept = host._held.layer(1, 1)[1]
    assert host.load(checkpoint, ((1,), ()), epoch=1).data == 0
    assert experts(host, 1) == {1: [0], 2: []}
    assert host._held.layer(1, 1)[0] is kept


def test_what_epochs_share_counts_once(host: ExpertHost, checkpoint: Path) -> None:
    host.load(checkpoint, ((0, 1), (2,)), epoch=1)
    host.load(checkpoint, ((1, 0, 3), ()), epoch=2)
    held = host._held.all()
    assert held.keys() == {(1, 0), (1, 1), (1, 3), (2, 2)}
    tensors = [tensor for weights in held.values() for tensor in tensors_of(weights)]
    assert host.report().resident_bytes == sum(tensor.nbytes for tensor in tensors)


def test_loads_from_many_threads_with_retires_between(host: ExpertHost, checkpoint: Path) -> None:
    """Whatever the order: no epoch comes back, and what is served has all its experts."""
    barrier = threading.Barrier(4)

    def load(epoch: int) -> bool:
        barrier.wait(20)
        try:
            host.load(checkpoint, ((epoch, epoch + 1), (epoch,)), epoch=epoch)
        except ClusterError:
            return False
        return True

    def retire() -> None:
        barrier.wait(20)
        host.retire(2)

    with ThreadPoolExecutor(4) as pool:
        retiring = pool.submit(retire)
        loaded = dict(zip((1, 2, 3), pool.map(load, (1, 2, 3)), strict=True))
        retiring.result(20)
    assert loaded[2]
    assert loaded[3]
    served = host.report().epochs
    assert set(served) <= {1, 2, 3}
    assert all(experts(host, epoch) == {1: [0, 1], 2: [0]} for epoch in served)
    host.retire(3)
    assert set(host.report().epochs) <= {3}
