"""What every kind of link promises, with both ends in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import FRAMES_IN_FLIGHT, MAX_HEADER_BYTES, Link, LinkKind
from moray.configs.errors import LinkError, PeerDiedError, PeerTimeoutError

Connect = Callable[[LinkKind], tuple[Link, Link]]

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.int64,
    torch.uint8,
]
SHAPES = [(), (1,), (0,), (0, 7168), (3, 5), (2, 3, 4), (1, 7168), (65, 7168)]
MEGABYTE = (1 << 18,)
"""A shape of float32 that is too large for gloo's shortcut through the control socket."""


def soon() -> Deadline:
    """A deadline that only a hanging test reaches."""
    return Deadline.after(20)


def same(received: torch.Tensor, sent: torch.Tensor) -> bool:
    """Equal in dtype, shape and bits."""
    return (
        received.dtype == sent.dtype
        and received.shape == sent.shape
        and torch.equal(received.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_arrive_bit_for_bit(connect: Connect, kind: LinkKind, shape: tuple[int, ...]) -> None:
    here, there = connect(kind)
    sent = [(torch.randn(shape) * 100).to(dtype) for dtype in DTYPES]
    for sender, receiver in ((here, there), (there, here)):
        sender.send(b"header", sent, deadline=soon())
        frame = receiver.recv(deadline=soon())
        assert frame.header == b"header"
        assert all(same(*pair) for pair in zip(frame.tensors, sent, strict=True))
        assert all(tensor.is_contiguous() for tensor in frame.tensors)


def test_both_ends_know_each_other(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    assert (here.peer, there.peer) == ("expert-host-0", "router-0")
    assert (here.kind, there.kind) == (kind, kind)
    assert "secret" not in repr(here) + str(vars(here))


def test_frames_without_tensors_or_header(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    here.send(b"", [], deadline=soon())
    frame = there.recv(deadline=soon())
    assert (frame.header, frame.tensors) == (b"", ())


def test_frames_grow_and_shrink(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    for tokens in (1, 20, 300, 0, 301, 1, 700):
        sent = torch.randn(tokens, 7168).to(torch.bfloat16)
        here.send(b"", [sent], deadline=soon())
        there.send(b"", there.recv(deadline=soon()).tensors, deadline=soon())
        assert same(here.recv(deadline=soon()).tensors[0], sent)


@pytest.mark.parametrize("shape", [(16,), MEGABYTE], ids=["small", "large"])
def test_two_frames_in_flight_and_a_third_held(connect: Connect, kind: LinkKind, shape: tuple[int, ...]) -> None:
    """What `recv` returned stays intact while two more frames arrive, though the sender reuses its own tensor."""
    here, there = connect(kind)
    tensor = torch.empty(shape)
    here.send(b"0", [tensor.fill_(0)], deadline=soon())
    held = there.recv(deadline=soon())
    for number in range(1, 1 + FRAMES_IN_FLIGHT):
        here.send(b"%d" % number, [tensor.fill_(number)], deadline=soon())
        tensor.fill_(-1)
    assert there.wait(deadline=soon())
    assert held.tensors[0].eq(0).all()
    for number in range(1, 1 + FRAMES_IN_FLIGHT):
        frame = there.recv(deadline=soon())
        assert frame.header == b"%d" % number
        assert frame.tensors[0].eq(number).all()


@pytest.mark.parametrize("shape", [(16,), MEGABYTE], ids=["small", "large"])
def test_both_ends_may_send_first(connect: Connect, kind: LinkKind, shape: tuple[int, ...]) -> None:
    here, there = connect(kind)
    for _ in range(3):
        here.send(b"", [torch.ones(shape)], deadline=soon())
        there.send(b"", [torch.zeros(shape)], deadline=soon())
        assert here.recv(deadline=soon()).tensors[0].eq(0).all()
        assert there.recv(deadline=soon()).tensors[0].eq(1).all()


def test_a_waiting_sender_goes_on_when_there_is_room(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    count = 40

    def send_all() -> None:
        for number in range(count):
            here.send(b"%d" % number, [torch.full(MEGABYTE, float(number))], deadline=soon())

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all)
        for number in range(count):
            frame = there.recv(deadline=soon())
            assert frame.header == b"%d" % number
            assert frame.tensors[0].eq(number).all()
        sending.result(20)


def test_views_and_inference_tensors(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            sent = torch.arange(24.0).view(4, 6).t()[1:]
            here.send(b"", [sent], deadline=soon())
            assert torch.equal(there.recv(deadline=soon()).tensors[0], sent)
    weight = torch.ones(3, requires_grad=True)
    here.send(b"", [weight], deadline=soon())
    received = there.recv(deadline=soon()).tensors[0]
    assert not received.requires_grad
    received += 1  # an ordinary tensor, whatever mode its frame was sent in
    assert received.eq(2).all()


PREPARED = ((torch.bfloat16, (3, 5)), (torch.int32, (2, 4)), (torch.float32, (0, 7)))


def test_frames_can_be_written_where_they_are_sent_from(connect: Connect, kind: LinkKind) -> None:
    """Whatever else is sent before and after; where a link has no such memory, it says so."""
    here, there = connect(kind)
    room = here.prepare(PREPARED, deadline=soon())
    assert (room is None) == (kind == "gloo")
    for step in range(7):
        for inference in (True, False):
            with torch.inference_mode(inference):
                sent = [torch.full(shape, step + inference).to(dtype) for dtype, shape in PREPARED]
                room = here.prepare(PREPARED, deadline=soon())
                if room is None:
                    room = tuple(map(torch.empty_like, sent))
                assert [(tensor.dtype, tuple(tensor.shape)) for tensor in room] == list(PREPARED)
                for tensor, content in zip(room, sent, strict=True):
                    tensor.copy_(content)
                here.send(b"%d" % step, room, deadline=soon())
            frame = there.recv(deadline=soon())
            assert frame.header == b"%d" % step
            assert all(same(*pair) for pair in zip(frame.tensors, sent, strict=True))
        here.send(b"", [torch.full((step, 7168), float(step))], deadline=soon())
        assert there.recv(deadline=soon()).tensors[0].eq(step).all()


def test_what_was_prepared_can_be_forgotten(connect: Connect, kind: LinkKind) -> None:
    """A host that cannot compute what it has prepared for answers something else."""
    here, there = connect(kind)
    room = here.prepare(PREPARED, deadline=soon())
    here.send(b"refused", [], deadline=soon())
    assert there.recv(deadline=soon()).tensors == ()
    if room is not None:
        room[1].fill_(7)
        here.send(b"late", room, deadline=soon())  # then they are tensors like any others
        assert there.recv(deadline=soon()).tensors[1].eq(7).all()
    with pytest.raises(ValueError, match=r"do not carry torch\.bool"):
        here.prepare(((torch.bool, (1,)),), deadline=soon())
    here.close()
    with pytest.raises(LinkError, match="was closed on this side"):
        here.prepare(PREPARED, deadline=soon())


def test_what_does_not_fit_the_format_leaves_the_link_as_it_was(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    with pytest.raises(ValueError, match="at most 4096 bytes"):
        here.send(bytes(MAX_HEADER_BYTES + 1), [], deadline=soon())
    with pytest.raises(ValueError, match=r"do not carry torch\.bool"):
        here.send(b"", [torch.zeros(1, dtype=torch.bool)], deadline=soon())
    here.send(bytes(MAX_HEADER_BYTES), [], deadline=soon())
    assert there.recv(deadline=soon()).header == bytes(MAX_HEADER_BYTES)


def test_a_silent_peer_is_a_timeout_and_breaks_the_link(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="link to expert-host-0: sent nothing before the deadline"):
        here.recv(deadline=Deadline.after(0.2))
    assert time.monotonic() - start >= 0.2
    with pytest.raises(PeerTimeoutError, match="is broken; sent nothing"):
        here.send(b"", [], deadline=soon())
    with pytest.raises(PeerTimeoutError, match="is broken"):
        here.check()
    with pytest.raises(PeerDiedError):  # and the peer need not wait to find out
        there.recv(deadline=soon())


def test_a_peer_that_does_not_read_is_a_timeout(connect: Connect, kind: LinkKind) -> None:
    here, _there = connect(kind)
    deadline = Deadline.after(0.5)

    def send_for_ever() -> None:
        for _ in range(1000):
            here.send(b"", [torch.zeros(MEGABYTE)], deadline=deadline)

    with pytest.raises(PeerTimeoutError):
        send_for_ever()
    assert deadline.passed
    with pytest.raises(LinkError, match="is broken"):
        here.recv(deadline=soon())


def test_data_that_is_there_is_received_even_after_the_deadline(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    here.send(b"late", [], deadline=soon())
    assert there.wait(deadline=soon())
    assert there.recv(deadline=Deadline.after(0)).header == b"late"


def test_wait_is_not_recv(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    assert not there.wait(deadline=Deadline.after(0.05))
    here.send(b"frame", [torch.ones(3)], deadline=soon())
    assert there.wait(deadline=soon())
    assert there.wait(deadline=soon())
    assert there.recv(deadline=soon()).header == b"frame"
    here.close()
    with pytest.raises(PeerDiedError):
        there.wait(deadline=soon())


def test_closing_is_seen_by_the_peer(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    there.check()
    here.close()
    with pytest.raises(PeerDiedError, match="link to router-0"):
        there.recv(deadline=soon())
    with pytest.raises(PeerDiedError, match="is broken"):
        there.send(b"", [], deadline=soon())


def test_check_sees_a_closed_peer_on_an_idle_link(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    there.close()

    def check_until(deadline: Deadline) -> None:
        while not deadline.passed:
            here.check()

    with pytest.raises(PeerDiedError):
        check_until(soon())


def test_a_closed_link_says_so(connect: Connect, kind: LinkKind) -> None:
    here, _there = connect(kind)
    here.close()
    here.close()
    here.abort()
    for operation in (
        lambda: here.recv(deadline=soon()),
        lambda: here.wait(deadline=soon()),
        lambda: here.send(b"", [], deadline=soon()),
        here.check,
    ):
        with pytest.raises(LinkError, match="was closed on this side"):
            operation()


def test_received_tensors_outlive_the_link(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    here.send(b"", [torch.arange(1 << 18)], deadline=soon())
    received = there.recv(deadline=soon()).tensors[0]
    here.close()
    there.close()
    assert torch.equal(received, torch.arange(1 << 18))


def when_in_use(link: Link, action: Callable[[], None]) -> threading.Thread:
    """Run `action` in another thread once an operation on `link` is in progress."""

    def wait_and_act() -> None:
        deadline = soon()
        while not link._busy.locked() and not deadline.passed:  # type: ignore[attr-defined]
            time.sleep(0.001)
        action()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_abort_ends_a_recv_in_another_thread(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    start = time.monotonic()
    thread = when_in_use(here, here.abort)
    with pytest.raises(LinkError, match="was closed on this side"):
        here.recv(deadline=soon())
    assert time.monotonic() - start < 5
    thread.join()
    with pytest.raises(PeerDiedError):
        there.recv(deadline=soon())


def test_abort_ends_a_send_in_another_thread(connect: Connect, kind: LinkKind) -> None:
    here, _there = connect(kind)

    def send_for_ever() -> None:
        while True:
            here.send(bytes(MAX_HEADER_BYTES), [], deadline=soon())

    start = time.monotonic()
    aborting = threading.Timer(0.2, here.abort)  # by then nothing more fits; if it does, the next send fails the same
    aborting.start()
    with pytest.raises(LinkError, match="was closed on this side"):
        send_for_ever()
    assert time.monotonic() - start < 10
    aborting.join()


def test_an_end_belongs_to_one_thread_at_a_time(connect: Connect, kind: LinkKind) -> None:
    here, there = connect(kind)
    refused: list[BaseException] = []

    def intrude() -> None:
        try:
            here.check()
        except RuntimeError as error:
            refused.append(error)
        there.send(b"go on", [], deadline=soon())

    thread = when_in_use(here, intrude)
    assert here.recv(deadline=soon()).header == b"go on"
    thread.join()
    assert len(refused) == 1
    assert "in use by another thread" in str(refused[0])


def test_an_interrupted_operation_breaks_the_link(
    connect: Connect, kind: LinkKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a frame: the two ends no longer agree on where they are, so neither may go on."""
    here, there = connect(kind)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(here, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        here.send(b"", [], deadline=soon())
    with pytest.raises(LinkError, match="is broken; an operation was interrupted by KeyboardInterrupt"):
        here.check()
    with pytest.raises(PeerDiedError):
        there.recv(deadline=soon())
