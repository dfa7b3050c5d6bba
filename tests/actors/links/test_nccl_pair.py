"""The NCCL side of a link without NCCL and without a GPU: a backend and streams that write down what is asked of them.

What they cannot show is that NCCL and CUDA do as they are told; that needs two GPUs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moray.actors.deadline import Deadline
from moray.actors.links.control import ControlChannel
from moray.actors.links.pair_groups import NcclPair, TransferStream, create_pair, transfer_device
from moray.actors.links.process_group import ProcessGroupLink
from moray.configs.errors import ConfigError, LinkError, PeerDiedError, PeerTimeoutError

CPU = torch.device("cpu")


def soon() -> Deadline:
    return Deadline.after(20)


class FakeCuda:
    """Streams of one thread, and a log of what happened on them, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = FakeStream(self, "compute")
        self.created = 0

    def new_stream(self, device: torch.device) -> FakeStream:
        self.created += 1
        return FakeStream(self, f"transfer{self.created}")

    @contextlib.contextmanager
    def entered(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)

    def record_stream(_: torch.Tensor, stream: FakeStream) -> None:
        fake.log.append(f"buffer kept for {stream.name}")

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return fake


class FakeWork:
    """A transfer that is completed once the queue it takes from, or puts into, allows."""

    def __init__(self, group: FakeGroup, complete: Callable[[], bool]) -> None:
        self._group, self._complete = group, complete
        self._done = False

    def is_completed(self) -> bool:
        self._done = self._done or self._group.error is not None or self._complete()
        return self._done

    def wait(self) -> bool:
        self._group.note("wait")
        if self._group.error is not None:
            raise RuntimeError(f"[file.cpp:12] {self._group.error}\nmore of it")
        return True


class FakeGroup:
    """One end of one direction: bytes go through a deque that both ends know."""

    def __init__(self, name: str, pipe: deque[torch.Tensor], log: list[str], cuda: FakeCuda) -> None:
        self.name = name
        self.pipe, self.log, self.cuda = pipe, log, cuda
        self.aborted = 0
        self.refuses = False
        self.error: str | None = None

    def note(self, what: str) -> None:
        self.log.append(f"{self.name}: {what} on {self.cuda.current.name}")

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> FakeWork:
        if self.refuses:
            raise RuntimeError("[file.cpp:12] communicator was aborted")
        self.note(f"send {tag} to {dst}")
        self.pipe.append(tensors[0].clone())
        return FakeWork(self, lambda: True)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> FakeWork:
        self.note(f"recv {tag} from {src}")

        def complete() -> bool:
            if self.pipe:
                tensors[0].copy_(self.pipe.popleft())
                return True
            return False

        return FakeWork(self, complete)

    def abort(self) -> None:
        self.aborted += 1


class Ends:
    """Both ends of a link whose groups are fakes, with one log."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.log = cuda.log
        forth, back = deque[torch.Tensor](), deque[torch.Tensor]()
        names = ("here out", forth, 0), ("here in", back, 0), ("there out", back, 1), ("there in", forth, 1)
        self.groups = {name: FakeGroup(name, pipe, self.log, cuda) for name, pipe, _ in names}
        pairs = [NcclPair(self.groups[name], rank, f"peer of {name[:-3].strip()}", CPU) for name, _, rank in names]  # type: ignore[arg-type]
        self.sockets = socket.socketpair()
        controls = [ControlChannel(sock, peer) for sock, peer in zip(self.sockets, ("there", "here"), strict=True)]
        self.here = ProcessGroupLink("nccl", controls[0], pairs[0], pairs[1])
        self.there = ProcessGroupLink("nccl", controls[1], pairs[2], pairs[3])
        stock = controls[0].send

        def logged_send(*arguments: Any, **named: Any) -> None:
            self.log.append("here: header")
            stock(*arguments, **named)

        controls[0].send = logged_send  # type: ignore[method-assign]

    def aborted(self, end: str) -> list[int]:
        return [group.aborted for name, group in self.groups.items() if name.startswith(end)]


@pytest.fixture
def ends(cuda: FakeCuda) -> Iterator[Ends]:
    made = Ends(cuda)
    yield made
    made.here.close()
    made.there.close()
    assert made.aborted("here") == [1, 1], "an end that is gone has aborted both its groups, once"
    assert made.aborted("there") == [1, 1]


def test_frames_go_through_the_groups_whatever_their_size(ends: Ends) -> None:
    for size in (1, 5, 1 << 18):
        sent = torch.arange(float(size))
        ends.here.send(b"head", [sent], deadline=soon())
        frame = ends.there.recv(deadline=soon())
        assert frame.header == b"head"
        assert torch.equal(frame.tensors[0], sent)
    assert sum("send" in line for line in ends.log) == 3
    ends.here.send(b"none", [], deadline=soon())
    assert ends.there.recv(deadline=soon()).tensors == ()
    assert sum("send" in line for line in ends.log) == 3


def test_every_direction_has_a_stream_of_its_own(cuda: FakeCuda, ends: Ends) -> None:
    assert cuda.created == 4


def test_the_header_goes_first_and_the_transfer_follows_the_caller_s_stream(ends: Ends) -> None:
    ends.log.clear()
    ends.here.send(b"", [torch.ones(3)], deadline=soon())
    assert ends.log == [
        "here: header",
        "transfer1 waits for compute",  # on which the payload was staged
        "buffer kept for transfer1",
        "here out: send 0 to 1 on transfer1",
    ]


def test_a_receive_waits_for_readers_of_its_buffer_and_readers_for_it(ends: Ends) -> None:
    ends.here.send(b"", [torch.ones(3)], deadline=soon())
    ends.log.clear()
    ends.there.recv(deadline=soon())
    assert ends.log == [
        "transfer4 waits for compute",  # which may still read what was received into the buffer before
        "buffer kept for transfer4",
        "there in: recv 0 from 0 on transfer4",
        "there in: wait on transfer4",
        "compute waits for transfer4",
    ]


def test_a_buffer_is_staged_again_only_after_its_transfer(ends: Ends) -> None:
    for number in range(3):
        ends.log.clear()
        ends.here.send(b"", [torch.full((3,), float(number))], deadline=soon())
    assert ends.log[:3] == ["here out: wait on transfer1", "compute waits for transfer1", "here: header"]
    assert [float(ends.there.recv(deadline=soon()).tensors[0][0]) for _ in range(3)] == [0.0, 1.0, 2.0]


def test_frames_a_caller_holds_stay_as_they_are(ends: Ends) -> None:
    held = []
    for number in range(5):
        ends.here.send(b"", [torch.full((40,), float(number))], deadline=soon())
        held.append(ends.there.recv(deadline=soon()).tensors[0])
    assert all(bool(tensor.eq(number).all()) for number, tensor in enumerate(held))


def announce_only(ends: Ends) -> None:
    """A frame whose payload never moves."""
    ends.here.send(b"", [torch.ones(3)], deadline=soon())
    ends.groups["here out"].pipe.clear()


def test_a_peer_that_dies_in_the_middle_of_a_payload_is_seen_and_aborted(ends: Ends) -> None:
    announce_only(ends)
    dying = threading.Timer(0.1, lambda: ends.sockets[0].shutdown(socket.SHUT_RDWR))
    dying.start()
    deadline = soon()
    with pytest.raises(PeerDiedError, match="closed the connection"):
        ends.there.recv(deadline=deadline)
    assert not deadline.passed
    assert ends.aborted("there") == [1, 1], "at once, both directions, without waiting for close"
    with pytest.raises(PeerDiedError, match="is broken"):
        ends.there.send(b"", [], deadline=soon())
    dying.join()


def test_a_payload_that_stands_still_is_a_timeout_and_aborted(ends: Ends) -> None:
    announce_only(ends)
    deadline = Deadline.after(0.1)
    with pytest.raises(PeerTimeoutError, match="did not finish a transfer before the deadline"):
        ends.there.recv(deadline=deadline)
    assert deadline.passed
    assert ends.aborted("there") == [1, 1]
    assert not any("there in: wait" in line for line in ends.log), "nothing may wait for a transfer that never ends"


def test_a_failed_transfer_is_no_frame(ends: Ends) -> None:
    """NCCL calls a transfer completed that met an error; the wait tells."""
    announce_only(ends)
    ends.groups["there in"].error = "NCCL error: remote process exited"
    with pytest.raises(PeerDiedError, match=r"connection lost during a transfer \(NCCL error: remote process exited\)"):
        ends.there.recv(deadline=soon())
    assert ends.aborted("there") == [1, 1]


def test_a_group_that_refuses_a_transfer_is_a_dead_peer(ends: Ends) -> None:
    ends.groups["here out"].refuses = True
    with pytest.raises(PeerDiedError, match=r"lost its process group \(communicator was aborted\)"):
        ends.here.send(b"", [torch.ones(3)], deadline=soon())
    assert ends.aborted("here") == [1, 1]


def test_an_interrupted_wait_aborts(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    announce_only(ends)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moray.actors.links.pair_groups.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ends.there.recv(deadline=soon())
    assert ends.aborted("there") == [1, 1]


def test_abort_from_another_thread_ends_a_wait_for_a_payload(ends: Ends) -> None:
    announce_only(ends)
    aborting = threading.Timer(0.1, ends.there.abort)
    aborting.start()
    with pytest.raises(LinkError, match="was closed on this side"):
        ends.there.recv(deadline=soon())
    aborting.join()
    assert ends.aborted("there") == [1, 1]


def test_a_link_broken_by_its_control_channel_gives_up_its_transfers(ends: Ends) -> None:
    """A send to a dead peer never completes: its kernel must not wait for `close`."""
    ends.there.send(b"", [torch.ones(3)], deadline=soon())
    ends.here.close()
    with pytest.raises(PeerDiedError):
        ends.there.recv(deadline=soon())
    assert ends.aborted("there") == [1, 1]


def test_streams_are_those_of_the_device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def current_stream(device: torch.device) -> FakeStream:
        asked.append(device)
        return cuda.current

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    device = torch.device("cuda", 3)
    with TransferStream(device).after_caller(torch.empty(1)):
        assert cuda.current.name == "transfer1"
    assert asked == [device]


class FakeProcessGroupNCCL:
    """What of torch's class is needed to set up a pair, where torch has none."""

    class Options:
        _timeout: object = None

    fails = False

    def __init__(self, store: object, rank: int, size: int, options: Options) -> None:
        if self.fails:
            raise RuntimeError("[file.cpp:12] ncclSystemError")
        self.arguments = (store, rank, size, options._timeout)


SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "1",
}


def test_setting_up_tells_torch_to_leave_failures_to_the_link(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.setenv(name, "something else")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeProcessGroupNCCL, raising=False)
    store = dist.HashStore()  # type: ignore[attr-defined]
    pair = create_pair("nccl", store, 1, "peer", CPU, host="127.0.0.1", deadline=soon())
    assert isinstance(pair, NcclPair)
    assert pair._group.arguments == (store, 1, 2, timedelta(days=1))  # type: ignore[attr-defined]
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS
    monkeypatch.setattr(FakeProcessGroupNCCL, "fails", True)
    with pytest.raises(LinkError, match=r"nccl could not be set up \(ncclSystemError\)"):
        create_pair("nccl", store, 1, "peer", CPU, host="127.0.0.1", deadline=soon())
    with pytest.raises(PeerTimeoutError, match="nccl was not set up before the deadline"):
        create_pair("nccl", store, 1, "peer", CPU, host="127.0.0.1", deadline=Deadline.after(0))


def test_where_buffers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transfer_device("gloo") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert transfer_device("nccl") == torch.device("cuda", 3)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="built without NCCL"):
        transfer_device("nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        transfer_device("nccl")
