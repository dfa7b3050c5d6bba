"""Peers in processes of their own that are killed, stopped, or talk nonsense."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import Link, LinkKind
from moray.actors.links.shm_memory import MIN_SLOT_BYTES, SLOTS, Arena, place_of
from moray.actors.links.wire import MessageType, encode, plan_payload
from moray.configs.errors import LinkError, PeerDiedError, PeerTimeoutError

Connect = Callable[[LinkKind], tuple[Link, Link]]

PATIENCE_S = 20.0
WELL_BEFORE_S = 5.0
"""Far above what a death takes to be seen (milliseconds), far below the deadline: a busy machine fails no test."""


@pytest.fixture(params=["shm", "gloo"])
def kind(request: pytest.FixtureRequest) -> LinkKind:
    return request.param  # type: ignore[no-any-return]


def patience() -> Deadline:
    return Deadline.after(PATIENCE_S)


class Killer:
    """Sends a signal to a peer once this process waits for it, and tells how long ago."""

    def __init__(self, peer: Any, number: signal.Signals) -> None:
        self._peer = peer
        self._number = number
        self._sent_at = 0.0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        time.sleep(0.1)  # long enough for a wait to have begun; nothing depends on it but the measured time
        self._sent_at = time.monotonic()
        self._peer.signal(self._number)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    @property
    def elapsed_s(self) -> float:
        self._thread.join()
        return time.monotonic() - self._sent_at


def test_frames_cross_processes(peers: Any, kind: LinkKind) -> None:
    with peers.start(kind, "echo") as peer:
        for tokens in (1, 64, 2, 500):
            sent = torch.randn(tokens, 7168).to(torch.bfloat16)
            peer.link.send(b"%d" % tokens, [sent, torch.arange(8 * tokens).view(tokens, 8)], deadline=patience())
            frame = peer.link.recv(deadline=patience())
            assert frame.header == b"%d" % tokens
            assert torch.equal(frame.tensors[0], sent)
            assert torch.equal(frame.tensors[1], torch.arange(8 * tokens).view(tokens, 8))


def test_a_peer_killed_while_we_wait(peers: Any, kind: LinkKind) -> None:
    with peers.start(kind, "hold") as peer, Killer(peer, signal.SIGKILL) as killer:
        with pytest.raises(PeerDiedError):
            peer.link.recv(deadline=patience())
        assert killer.elapsed_s < WELL_BEFORE_S
        with pytest.raises(PeerDiedError, match="is broken"):
            peer.link.send(b"", [], deadline=patience())


def test_a_peer_killed_in_the_middle_of_a_payload(peers: Any) -> None:
    with peers.start("gloo", "announce_only") as peer, Killer(peer, signal.SIGKILL) as killer:
        with pytest.raises(PeerDiedError):
            peer.link.recv(deadline=patience())
        assert killer.elapsed_s < WELL_BEFORE_S


def send_until_it_fails(link: Link, deadline: Deadline) -> None:
    for _ in range(1000):
        link.send(b"", [torch.zeros(1 << 18)], deadline=deadline)


def test_a_peer_killed_while_we_wait_to_send(peers: Any, kind: LinkKind) -> None:
    with peers.start(kind, "hold") as peer, Killer(peer, signal.SIGKILL) as killer:
        with pytest.raises(PeerDiedError):
            send_until_it_fails(peer.link, patience())
        assert killer.elapsed_s < WELL_BEFORE_S


def test_a_peer_killed_while_the_link_is_idle(peers: Any, kind: LinkKind) -> None:
    with peers.start(kind, "hold") as peer:
        peer.link.check()
        peer.signal(signal.SIGKILL)

        def check_until(deadline: Deadline) -> None:
            while not deadline.passed:
                peer.link.check()

        with pytest.raises(PeerDiedError):
            check_until(patience())


@pytest.mark.parametrize("operation", ["recv", "send"])
def test_a_stopped_peer_is_a_timeout_for_good(peers: Any, kind: LinkKind, operation: str) -> None:
    with peers.start(kind, "echo") as peer:
        peer.signal(signal.SIGSTOP)
        deadline = Deadline.after(0.5)
        act = peer.link.recv if operation == "recv" else partial(send_until_it_fails, peer.link)
        with pytest.raises(PeerTimeoutError):
            act(deadline=deadline)
        assert deadline.passed
        peer.signal(signal.SIGCONT)
        with pytest.raises(PeerTimeoutError, match="is broken"):
            peer.link.recv(deadline=patience())


def test_a_peer_stopped_in_the_middle_of_a_payload(peers: Any) -> None:
    with peers.start("gloo", "announce_only") as peer:
        deadline = Deadline.after(0.5)
        with pytest.raises(PeerTimeoutError, match="did not finish a transfer"):
            peer.link.recv(deadline=deadline)
        assert deadline.passed


def test_one_broken_link_leaves_others_alone(peers: Any, kind: LinkKind) -> None:
    with peers.start(kind, "echo") as good, peers.start(kind, "hold") as bad:
        bad.signal(signal.SIGKILL)
        with pytest.raises(PeerDiedError):
            bad.link.recv(deadline=patience())
        sent = torch.randn(100, 7168)
        good.link.send(b"", [sent], deadline=patience())
        assert torch.equal(good.link.recv(deadline=patience()).tensors[0], sent)


def inject(link: Any, data: bytes) -> None:
    """Put bytes on a link's socket past its own code."""
    (link._sock if link.kind == "shm" else link._control._sock).send(data)


FRAME = encode(MessageType.FRAME, 0, b"", plan_payload([torch.zeros(3)]))


@pytest.mark.parametrize(
    ("nonsense", "complaint"),
    [
        (b"\xff" * 64, "no Moray message"),
        (FRAME[:-1] + b"x", "checksum"),
        (encode(MessageType.FRAME, place_of(5, 0)), "frame 5 where 0 belongs|FRAME 15 where FRAME 0"),
        (encode(MessageType.READY, 0), "READY"),
    ],
    ids=["garbage", "corrupt", "out of sequence", "wrong type"],
)
def test_nonsense_is_an_error_and_breaks_the_link(
    connect: Connect, kind: LinkKind, nonsense: bytes, complaint: str
) -> None:
    here, there = connect(kind)
    inject(there, nonsense)
    with pytest.raises(LinkError, match=complaint):
        here.recv(deadline=patience())
    with pytest.raises(LinkError, match="is broken"):
        here.recv(deadline=patience())


def test_a_shm_frame_without_its_memory_is_an_error(connect: Connect) -> None:
    here, there = connect("shm")
    inject(there, FRAME)
    with pytest.raises(LinkError, match="without an arena"):
        here.recv(deadline=patience())


@pytest.mark.parametrize("flaw", ["unsealed", "wrong size", "not memory"])
def test_shared_memory_that_could_hurt_is_refused(flaw: str) -> None:
    """An unsealed memory object could be shrunk under our reads, which would then be a SIGBUS."""
    if flaw == "not memory":
        fd, _write = os.pipe()
        os.close(_write)
    else:
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SLOTS * MIN_SLOT_BYTES + (flaw == "wrong size"))
        if flaw == "wrong size":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with pytest.raises(LinkError, match=r"sent shared memory|cannot be mapped"):
        Arena.attach(fd, MIN_SLOT_BYTES, "peer")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_corrupt_control_page_is_an_error(connect: Connect) -> None:
    here, there = connect("shm")
    there._page.release(77)  # type: ignore[attr-defined]
    with pytest.raises(LinkError, match="corrupted the control page"):
        here.send(b"", [], deadline=patience())
