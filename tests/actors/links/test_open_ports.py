"""What gloo opens is closed to everybody once a link stands, and nobody can stand in for the peer before."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

import pytest

from moray.actors.deadline import Deadline
from moray.actors.links import Link, Listener, dial, listen, open_ports
from moray.actors.links.control import ControlChannel
from moray.actors.links.open_ports import close_ports
from moray.actors.links.rendezvous import Rendezvous
from moray.actors.links.wire import MessageType, encode
from moray.configs.errors import LinkError

SECRET = b"the secret of the link tests"


def soon() -> Deadline:
    return Deadline.after(20)


@pytest.fixture
def listener() -> Iterator[Listener]:
    with contextlib.closing(listen("gloo", bind_host="127.0.0.1", secret=SECRET, identity="expert-host-0")) as listener:
        yield listener


def places() -> set[tuple[str, int]]:
    """Where this process listens."""
    found = set()
    for sock in open_ports._listening():
        with sock:
            found.add(sock.getsockname()[:2])
    return found


def answers(place: tuple[str, int]) -> bool:
    """Whether a connection comes about. On one machine the kernel knows at once."""
    with socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET) as sock:
        sock.setblocking(False)
        sock.connect_ex(place)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(50))


def linked(listener: Listener) -> tuple[Link, Link]:
    here = dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())
    there = listener.accept(deadline=soon())
    assert there is not None
    return here, there


def test_a_link_leaves_no_port_open(listener: Listener) -> None:
    before = places()
    here, there = linked(listener)
    with contextlib.closing(here), contextlib.closing(there):
        opened = places() - before
        assert opened, "gloo listens, or this test is about nothing"
        assert {place[0] for place in opened} == {"127.0.0.1"}
        assert [place for place in opened if answers(place)] == []
        assert all(answers(place) for place in before if place[0] == "127.0.0.1")
        here.send(b"still here", [], deadline=soon())
        assert there.recv(deadline=soon()).header == b"still here"
    assert not opened & places()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_only_what_was_published_is_closed(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as published,
        socket.create_server((host, 0), family=family) as other,
        socket.create_connection(published.getsockname()[:2]) as early,
    ):
        accepted, _ = published.accept()
        with accepted:
            assert close_ports([b"junk", b"some head" + open_ports._sockaddr(published) + os.urandom(20)]) == 1
            assert not answers(published.getsockname()[:2])
            assert answers(other.getsockname()[:2])
            early.send(b"hello")
            assert accepted.recv(5) == b"hello"


def test_a_group_whose_port_cannot_be_closed_is_not_used(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.actors.links.pair_groups.close_ports", lambda _: 0)
    with pytest.raises(LinkError, match="would stay open to anybody"):
        dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())


def test_who_takes_the_peers_place_in_a_group_is_found_out(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = Rendezvous.get
    monkeypatch.setattr(Rendezvous, "get", lambda self, key: bytes(32) if key.endswith("probe") else told(self, key))
    with pytest.raises(LinkError):
        dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())
    assert "somebody else took its place in the gloo group" in caplog.text


def test_a_peer_cannot_fill_the_rendezvous() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(encode(MessageType.STORE, 0, b"key %d\0value" % number) for number in range(300)))
        with pytest.raises(LinkError, match="set more than 256 keys"):
            Rendezvous(ControlChannel(ours, "router-0"), soon()).get("another")
