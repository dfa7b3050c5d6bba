from __future__ import annotations

import logging
import threading

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import FRAMES_IN_FLIGHT, InlineLink
from moray.configs.errors import LinkError, PeerDiedError, PeerTimeoutError


def soon() -> Deadline:
    return Deadline.after(20)


class Host:
    """The driven end of a link: doubles what it gets."""

    def __init__(self, link: InlineLink) -> None:
        self.link = link
        self.threads: set[int] = set()
        link.drive(self.serve_one)

    def serve_one(self) -> None:
        self.threads.add(threading.get_ident())
        frame = self.link.recv(deadline=soon())
        self.link.send(frame.header, [tensor * 2 for tensor in frame.tensors], deadline=soon())


def test_the_waiting_thread_runs_the_handler() -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")
    host = Host(end)
    for number in range(5):
        router.send(b"%d" % number, [torch.full((2,), float(number))], deadline=soon())
        frame = router.recv(deadline=soon())
        assert frame.header == b"%d" % number
        assert frame.tensors[0].tolist() == [2.0 * number] * 2
    assert host.threads == {threading.get_ident()}
    assert threading.active_count() == len(threading.enumerate())


def test_several_frames_are_answered_in_order() -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")
    Host(end)
    for number in range(2 * FRAMES_IN_FLIGHT):  # the sender drives too when there is no room
        router.send(b"%d" % number, [], deadline=soon())
    assert [router.recv(deadline=soon()).header for _ in range(2 * FRAMES_IN_FLIGHT)] == [b"0", b"1", b"2", b"3"]


def test_two_links_of_one_host_are_driven_apart() -> None:
    routers = []
    for name in ("router-0", "router-1"):
        router, end = InlineLink.pair(name, "expert-host-0")
        Host(end)
        router.send(name.encode(), [], deadline=soon())
        routers.append(router)
    assert [router.recv(deadline=soon()).header for router in reversed(routers)] == [b"router-1", b"router-0"]


def test_a_killed_host_is_a_dead_peer() -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")
    Host(end)
    router.send(b"", [], deadline=soon())
    end.close()
    with pytest.raises(PeerDiedError, match="expert-host-0"):
        router.recv(deadline=soon())


def test_a_stopped_host_is_a_timeout() -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")
    Host(end)
    end.drive(None)
    router.send(b"", [], deadline=soon())
    with pytest.raises(PeerTimeoutError):
        router.recv(deadline=Deadline.after(0.05))


def test_a_handler_that_answers_nothing_is_a_timeout() -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")

    def swallow() -> None:
        end.recv(deadline=soon())

    end.drive(swallow)
    router.send(b"", [], deadline=soon())
    assert not router.wait(deadline=Deadline.after(0.05))
    with pytest.raises(PeerTimeoutError):
        router.recv(deadline=Deadline.after(0.05))


def test_a_failing_handler_is_a_dead_peer_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")

    def fail() -> None:
        end.recv(deadline=soon())
        raise ZeroDivisionError("in the experts")

    end.drive(fail)
    router.send(b"", [], deadline=soon())
    with (
        caplog.at_level(logging.ERROR, "moray.links"),
        pytest.raises(PeerDiedError, match="ZeroDivisionError") as caught,
    ):
        router.recv(deadline=soon())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "the handler of expert-host-0 failed" in caplog.text
    with pytest.raises(LinkError):
        end.send(b"", [], deadline=soon())


def test_a_handler_registered_while_the_other_end_waits_is_run() -> None:
    router, end = InlineLink.pair("router-0", "expert-host-0")
    router.send(b"waiting", [], deadline=soon())
    registering = threading.Timer(0.05, lambda: Host(end))
    registering.start()
    assert router.recv(deadline=soon()).header == b"waiting"
    registering.join()
