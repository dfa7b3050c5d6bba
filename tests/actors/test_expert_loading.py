"""Loading from the disk and from other hosts at once: who gives what, who may fail, and what is counted."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from moray.actors import expert_host, expert_loading
from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.expert_queue import ExpertQueue
from moray.actors.links import Frame, Link, LinkAddress, LinkKind, listen
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.testing import SECRET
from moray.actors.weight_copy import WeightCopier, WeightSource, tensors_of
from moray.configs.errors import CheckpointError, ConfigError
from moray.model.checkpoint import Checkpoint
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.loading import expert_layout
from moray.model.progress import Advance
from moray.model.testing import write_random_checkpoint

HELD = ((4, 1, 6), (0, 7))
"""What the source holds, of layers 1 and 2."""

HELD_KEYS = frozenset({(1, 4), (1, 1), (1, 6), (2, 0), (2, 7)})
MORE = ((6, 3, 4, 1), (7, 0, 2))
"""All of that and two more: (1, 3) and (2, 2)."""

ADDRESS = LinkAddress("inline", "nobody#0")


class Disk:
    """Stands in for `os.preadv`: counts bytes, and can be made to fail or to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        self.error: OSError | None = None
        self.go = threading.Event()
        self.go.set()
        self.asked = threading.Event()
        self._lock = threading.Lock()
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.asked.set()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        count = self._real(descriptor, buffers, offset)
        with self._lock:
            self.read += count
        return count


class Shown:
    """A progress that remembers, and can act on the first bytes."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.totals: list[int] = []
        self.advances: list[int] = []
        self._then = then

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
        assert description == "experts"
        self.totals.append(total_bytes)
        yield self._advance

    def _advance(self, count: int) -> None:
        self.advances.append(count)
        self._then()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", seed=9)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def source(checkpoint: Path) -> Iterator[ExpertHost]:
    source = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    source.load(checkpoint, HELD, epoch=3)
    yield source
    source.stop()


@pytest.fixture
def host() -> Iterator[ExpertHost]:
    host = ExpertHost("expert-host-1", compute=Compute.on_cpu())
    yield host
    host.stop()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert set(threading.enumerate()) <= before


def offered(source: ExpertHost, kind: LinkKind = "inline") -> dict[str, WeightSource]:
    address = source.listen(kind, bind_host="127.0.0.1", secret=SECRET)
    return {source.host_id: WeightSource((address,), HELD_KEYS)}


def load(
    host: ExpertHost,
    checkpoint: Path,
    slots: Sequence[Sequence[int]],
    sources: dict[str, WeightSource],
    *,
    link: LinkKind = "inline",
    progress: Shown | None = None,
) -> tuple[int, int]:
    """Bytes read and copied."""
    bytes_read = host.load(
        checkpoint, slots, epoch=4, sources=sources, link=link, secret=SECRET, progress=progress or Shown()
    )
    return bytes_read.data, bytes_read.copied


def size_of(checkpoint: Path, keys: int) -> int:
    """Bytes of so many experts in the checkpoint; all are of one size."""
    return keys * expert_layout(Checkpoint.open(checkpoint), ModelConfig.load(checkpoint), 1, 0).nbytes


def assert_holds(host: ExpertHost, checkpoint: Path, slots: Sequence[Sequence[int]]) -> None:
    """The host has, and answers, what one has that has read everything."""
    reference = ExpertHost("reference", compute=host.compute)
    reference.load(checkpoint, slots, epoch=4)
    ours, expected = host._held.all(), reference._held.all()
    assert ours.keys() == expected.keys()
    for key, weights in ours.items():
        for mine, theirs in zip(tensors_of(weights), tensors_of(expected[key]), strict=True):
            assert torch.equal(mine, theirs)
    for layer, held in zip((1, 2), slots, strict=True):
        hidden = torch.randn(4, 192, generator=torch.Generator().manual_seed(layer)).to(host.compute.dtype)
        pairs = torch.tensor([[i % 4 for i in range(len(held))], list(range(len(held)))], dtype=torch.int32)
        frame = Frame(MoeHeader(Kind.WORK, layer, 4, 1).pack(), (hidden, pairs))
        (answer,), (right,) = host.handle(frame)[1], reference.handle(frame)[1]
        assert torch.equal(answer, right)
    assert host.report().resident_bytes == reference.report().resident_bytes


@pytest.mark.parametrize("kind", ["inline", "shm", "gloo"])
def test_what_a_source_has_is_copied_while_the_disk_reads_the_rest(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk, kind: LinkKind
) -> None:
    """Here the disk is slow: it reads nothing before everything that can be copied is there."""
    sources = offered(source, kind)
    disk.go.clear()
    progress = Shown(lambda: disk.go.set() if len(progress.advances) == 5 else None)
    data, copied = load(host, checkpoint, MORE, sources, link=kind, progress=progress)
    assert (data, copied) == (size_of(checkpoint, 2), size_of(checkpoint, 5))
    assert disk.read == data
    assert progress.totals == [sum(progress.advances)] == [data + copied]
    assert_holds(host, checkpoint, MORE)


def test_a_source_that_has_nothing_of_it_is_left_alone(
    checkpoint: Path, host: ExpertHost, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {
        "expert-host-0": WeightSource((ADDRESS,), frozenset({(1, 5)})),
        "expert-host-1": WeightSource((ADDRESS,), HELD_KEYS),  # itself
    }
    assert load(host, checkpoint, HELD, sources) == (size_of(checkpoint, 5), 0)
    assert "source_failed" not in caplog.text


def test_a_disk_that_fails_is_made_up_for_by_sources_that_have_everything(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = OSError(5, "Input/output error")
    assert load(host, checkpoint, HELD, offered(source)) == (0, size_of(checkpoint, 5))
    disk.error = None
    assert_holds(host, checkpoint, HELD)
    (failed,) = [r.getMessage() for r in caplog.records if "disk_failed" in r.getMessage()]
    assert failed.startswith("event=disk_failed host=expert-host-1 epoch=4 reason=")
    assert "Input/output error" in failed


def test_a_disk_that_hangs_is_not_waited_for(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_loading, "_JOIN_S", 0.01)
    disk.go.clear()
    assert load(host, checkpoint, HELD, offered(source)) == (0, size_of(checkpoint, 5))
    assert disk.asked.is_set()
    disk.go.set()


def test_a_disk_that_fails_with_what_nobody_else_has_is_an_error_and_changes_nothing(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk
) -> None:
    host.load(checkpoint, ((5,), ()), epoch=2)
    before = host.report()
    disk.error = OSError(5, "Input/output error")
    with pytest.raises(CheckpointError, match=r"Input/output error.*check the disk"):
        load(host, checkpoint, MORE, offered(source))
    assert host.report() == before
    disk.error = None
    assert load(host, checkpoint, MORE, {}) == (size_of(checkpoint, 7), 0)


def test_a_source_that_is_not_there_costs_nothing(
    checkpoint: Path, host: ExpertHost, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {"expert-host-0": WeightSource((ADDRESS,), HELD_KEYS)}
    assert load(host, checkpoint, HELD, sources) == (size_of(checkpoint, 5), 0)
    assert_holds(host, checkpoint, HELD)


def test_a_source_that_is_not_ours_is_left_out(checkpoint: Path, source: ExpertHost, host: ExpertHost) -> None:
    address = source.listen("shm", bind_host="127.0.0.1", secret=b"another secret of 16 bytes")
    sources = {source.host_id: WeightSource((address,), HELD_KEYS)}
    assert load(host, checkpoint, HELD, sources, link="shm") == (size_of(checkpoint, 5), 0)


def test_a_source_that_offers_no_such_link_is_left_out(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = OSError(5, "Input/output error")  # so that it matters
    with pytest.raises((CheckpointError, ConfigError)):
        load(host, checkpoint, HELD, offered(source, "shm"), link="gloo")
    assert "event=source_failed host=expert-host-1 source=expert-host-0 reason=link = 'gloo' needs" in caplog.text


def test_a_source_that_computes_in_another_form_refuses_and_the_disk_is_read(
    checkpoint: Path, source: ExpertHost, caplog: pytest.LogCaptureFixture
) -> None:
    host = ExpertHost("expert-host-1", compute=Compute.on_cpu(torch.bfloat16))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        disk.go.clear()  # until the source has refused
        patch.setattr(ExpertQueue, "withdraw", _then(ExpertQueue.withdraw, disk.go.set))
        assert load(host, checkpoint, HELD, offered(source)) == (size_of(checkpoint, 5), 0)
    assert "refused to give weights: expert-host-0: layer" in caplog.text
    assert_holds(host, checkpoint, HELD)
    host.stop()


def _then(method: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    def both(*args: object) -> None:
        method(*args)
        then()

    return both


class FakeSource:
    """Listens like a host, and answers the first `answers` requests by way of a real one; then it does `then`."""

    def __init__(self, real: ExpertHost, answers: int, then: Callable[[Link], object]) -> None:
        self._real = real
        self._answers = answers
        self._then = then
        self._listener = listen("inline", bind_host="", secret=SECRET, identity="expert-host-0")
        self.offered = {"expert-host-0": WeightSource((self._listener.address,), HELD_KEYS)}
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        link = self._listener.accept(deadline=Deadline.after(20))
        assert link is not None
        for _ in range(self._answers):
            frame = link.recv(deadline=Deadline.after(20))
            link.send(*self._real.handle(frame), deadline=Deadline.after(20))
        link.recv(deadline=Deadline.after(20))
        self._then(link)
        self._link = link

    def close(self) -> None:
        self._thread.join(20)
        self._link.close()
        self._listener.close()


@pytest.mark.parametrize("answers", [0, 2], ids=["before it gave any", "after it gave some"])
def test_a_source_that_dies_gives_back_what_it_had_in_hand(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    monkeypatch.setattr(expert_loading, "WeightCopier", partial(WeightCopier, frame_bytes=400_000))
    disk.go.clear()  # the source is first

    def die(link: Link) -> None:
        link.close()
        disk.go.set()

    with contextlib.closing(FakeSource(source, answers, die)) as fake:
        data, copied = load(host, checkpoint, HELD, fake.offered)
    assert data + copied == size_of(checkpoint, 5)
    assert data > 0
    assert (copied > 0) == (answers > 0)
    assert_holds(host, checkpoint, HELD)


def test_a_source_that_falls_silent_delays_nothing(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes over what it has in hand, however far away its own deadline is."""
    monkeypatch.setattr(expert_host, "ExpertLoader", partial(expert_loading.ExpertLoader, silence_s=3600.0))
    done = threading.Event()
    disk.go.clear()

    def fall_silent(_: Link) -> None:
        disk.go.set()
        assert done.wait(20)

    with contextlib.closing(FakeSource(source, 0, fall_silent)) as fake:
        assert load(host, checkpoint, HELD, fake.offered) == (size_of(checkpoint, 5), 0)
        done.set()
    assert_holds(host, checkpoint, HELD)


def test_several_sources_and_a_host_that_serves_meanwhile(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, disk: Disk
) -> None:
    """The load of a host that serves, from another one that serves, both with routers that go on asking."""
    host.load(checkpoint, ((5, 3), ()), epoch=3)
    other = ExpertHost("expert-host-2", compute=Compute.on_cpu())
    other.load(checkpoint, HELD, epoch=1)
    links = [source.inline_link("router-0"), host.inline_link("router-0")]
    stop = threading.Event()
    answers: list[torch.Tensor] = []
    wrong: list[MoeHeader] = []

    def route() -> None:
        hidden, pairs = torch.ones(1, 192), torch.tensor([[0, 0], [0, 1]], dtype=torch.int32)
        while not stop.is_set():
            for link in links:
                link.send(MoeHeader(Kind.WORK, 1, 3, 1).pack(), [hidden, pairs], deadline=Deadline.after(20))
                frame = link.recv(deadline=Deadline.after(20))
                if MoeHeader.unpack(frame.header).kind is not Kind.DONE:
                    wrong.append(MoeHeader.unpack(frame.header))
                answers.append(frame.tensors[0].clone())

    thread = threading.Thread(target=route)
    thread.start()
    disk.error = OSError(5, "Input/output error")
    data, copied = load(host, checkpoint, HELD, offered(source) | offered(other))
    stop.set()
    thread.join(20)
    disk.error = None
    assert (data, copied) == (0, size_of(checkpoint, 5))
    assert wrong == []
    assert all(torch.equal(answer, answers[i % 2]) for i, answer in enumerate(answers))
    host.retire(4)
    assert_holds(host, checkpoint, HELD)
    other.stop()


def test_errors_that_nobody_foresaw_are_the_callers(
    checkpoint: Path, source: ExpertHost, host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for a weight")

    monkeypatch.setattr(expert_loading, "mlp_weights", fail)
    with pytest.raises(MemoryError, match="no room for a weight"):
        load(host, checkpoint, HELD, offered(source))
    assert host.report().epochs == ()
