"""Who gets in, and who cannot keep others out."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from moray.actors.deadline import Deadline
from moray.actors.links import LinkAddress, LinkKind, Listener, acceptor, dial, listen, machine_identity
from moray.actors.links.handshake import authenticate
from moray.actors.links.sockets import dial_tcp, split_endpoint
from moray.configs.errors import ConfigError, HandshakeError, PeerDiedError, PeerTimeoutError

SECRET = b"the secret of the link tests"
OTHER_SECRET = b"the secret of another cluster"


def soon() -> Deadline:
    return Deadline.after(20)


@pytest.fixture
def listener(kind: LinkKind) -> Iterator[Listener]:
    with contextlib.closing(listen(kind, bind_host="127.0.0.1", secret=SECRET, identity="expert-host-0")) as listener:
        yield listener


sockets_only = pytest.mark.parametrize("kind", ["shm", "gloo"])


def connect_raw(address: LinkAddress) -> socket.socket:
    """A connection without a handshake."""
    if address.kind == "gloo":
        return socket.create_connection(split_endpoint(address.endpoint), timeout=20)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(f"\0{address.endpoint}")
    return sock


def assert_good_dialler_gets_in(listener: Listener) -> None:
    with contextlib.closing(dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())) as here:
        there = listener.accept(deadline=soon())
        assert there is not None
        with contextlib.closing(there):
            here.send(b"hello", [], deadline=soon())
            assert there.recv(deadline=soon()).header == b"hello"


def test_accept_without_a_dialler_returns_none(listener: Listener) -> None:
    assert listener.accept(deadline=Deadline.after(0.05)) is None
    assert_good_dialler_gets_in(listener)


def test_several_routers_are_accepted(listener: Listener) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(3):
            link = dial(listener.address, secret=SECRET, identity=f"router-{number}", deadline=soon())
            stack.callback(link.close)
        accepted = set()
        for _ in range(3):
            other = listener.accept(deadline=soon())
            assert other is not None
            stack.callback(other.close)
            accepted.add(other.peer)
        assert accepted == {"router-0", "router-1", "router-2"}


def test_another_secret_is_refused_and_logged(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moray.links"), pytest.raises(HandshakeError, match="the secrets differ"):
        dial(listener.address, secret=OTHER_SECRET, identity="router-0", deadline=soon())
    assert_good_dialler_gets_in(listener)
    assert "does not know the secret" in caplog.text
    assert "router-0" in caplog.text
    assert SECRET.decode() not in caplog.text
    assert OTHER_SECRET.decode() not in caplog.text


@sockets_only
def test_a_silent_connection_delays_nobody(
    listener: Listener,
) -> None:
    with connect_raw(listener.address), connect_raw(listener.address):
        start = time.monotonic()
        assert_good_dialler_gets_in(listener)
        assert time.monotonic() - start < acceptor.HANDSHAKE_TIMEOUT_S


@sockets_only
def test_a_silent_connection_is_dropped(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "HANDSHAKE_TIMEOUT_S", 0.05)
    with caplog.at_level(logging.WARNING, "moray.links"), connect_raw(listener.address) as silent:
        assert silent.recv(1) == b""
    assert "sent nothing before the deadline" in caplog.text


@sockets_only
def test_garbage_is_dropped(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moray.links"), connect_raw(listener.address) as vandal:
        vandal.send(b"\xff" * 4096)
        with contextlib.suppress(ConnectionResetError):  # what TCP makes of closing with bytes unread
            while vandal.recv(4096):
                pass
    assert_good_dialler_gets_in(listener)
    assert "does not speak Moray's handshake" in caplog.text


@sockets_only
def test_silent_connections_make_room_for_others(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "MAX_HANDSHAKES", 2)
    with (
        caplog.at_level(logging.WARNING, "moray.links"),
        connect_raw(listener.address) as first,
        connect_raw(listener.address),
        connect_raw(listener.address),
    ):
        assert first.recv(1) == b""
        assert_good_dialler_gets_in(listener)
    assert "2 handshakes in progress" in caplog.text


def test_a_crowd_from_one_address_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes of whoever has most connections, however long a lonely one has been there."""
    monkeypatch.setattr(acceptor, "MAX_HANDSHAKES", 3)
    with contextlib.closing(listen("gloo", bind_host="127.0.0.1", secret=SECRET, identity="h")) as listener:
        place = split_endpoint(listener.address.endpoint)
        with contextlib.ExitStack() as stack:
            lonely = stack.enter_context(socket.create_connection(place, 20, ("127.0.0.2", 0)))
            crowd = [stack.enter_context(socket.create_connection(place, 20)) for _ in range(4)]
            for first in crowd[:2]:
                assert first.recv(1) == b""
            for other in (lonely, crowd[-1]):
                assert authenticate(
                    other, secret=SECRET, identity="router-0", channel="link/gloo", initiator=True, deadline=soon()
                )


@sockets_only
def test_knocking_does_not_fill_the_log(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "_LOGGED", 3)
    with caplog.at_level(logging.WARNING, "moray.links"):
        for _ in range(10):
            with connect_raw(listener.address) as vandal:
                vandal.send(b"\xff")
                with contextlib.suppress(ConnectionResetError):
                    while vandal.recv(4096):
                        pass
        assert len(caplog.messages) <= 3
        monkeypatch.setattr(acceptor, "_LOGGED_PER_S", 0.0)
        with connect_raw(listener.address) as vandal, contextlib.suppress(ConnectionResetError):
            vandal.send(b"\xff")
            while vandal.recv(4096):
                pass
    listener.close()
    assert "expert-host-0 refused 7 more connections" in caplog.text


@sockets_only
def test_closing_gives_up_handshakes_and_unaccepted_links(listener: Listener) -> None:
    with connect_raw(listener.address) as silent:
        link = dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())
        with contextlib.closing(link):
            start = time.monotonic()
            listener.close()
            assert time.monotonic() - start < acceptor.HANDSHAKE_TIMEOUT_S
            assert silent.recv(1) == b""
            with pytest.raises(PeerDiedError):
                link.recv(deadline=soon())


def test_closing_ends_an_accept_in_progress(listener: Listener) -> None:
    closing = threading.Timer(0.05, listener.close)
    closing.start()
    start = time.monotonic()
    assert listener.accept(deadline=soon()) is None
    assert time.monotonic() - start < 10
    closing.join()
    listener.close()
    assert listener.accept(deadline=soon()) is None


def test_links_outlive_their_listener(listener: Listener) -> None:
    with contextlib.closing(dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())) as here:
        there = listener.accept(deadline=soon())
        assert there is not None
        with contextlib.closing(there):
            listener.close()
            here.send(b"still here", [], deadline=soon())
            assert there.recv(deadline=soon()).header == b"still here"


def test_dialling_where_nobody_listens_any_more(listener: Listener) -> None:
    listener.close()
    with pytest.raises(PeerDiedError):
        dial(listener.address, secret=SECRET, identity="router-0", deadline=soon())


def test_a_listener_that_never_answers_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = LinkAddress("gloo", f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(PeerTimeoutError):
            dial(address, secret=SECRET, identity="router-0", deadline=Deadline.after(0.1))


def test_a_full_backlog_is_a_timeout() -> None:
    """A listener whose process is stopped accepts nobody: the dialler's deadline must hold even then."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute, socket.socket(mute.family, mute.type) as first:
        mute.bind("\0moray-test-full-backlog")
        mute.listen(0)
        first.connect("\0moray-test-full-backlog")
        address = LinkAddress("shm", "moray-test-full-backlog", machine_identity())
        with pytest.raises(PeerTimeoutError):
            dial(address, secret=SECRET, identity="router-0", deadline=Deadline.after(0.1))


def test_a_gloo_listener_refuses_an_nccl_dialler() -> None:
    """Both kinds of process group use TCP: the handshake keeps them apart."""
    with (
        contextlib.closing(listen("gloo", bind_host="127.0.0.1", secret=SECRET, identity="h")) as listener,
        dial_tcp(listener.address.endpoint, deadline=soon()) as sock,
        pytest.raises(HandshakeError, match="another kind of connection"),
    ):
        authenticate(sock, secret=SECRET, identity="r", channel="link/nccl", initiator=True, deadline=soon())


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "no.such.host.invalid", "203.0.113.7"])
def test_addresses_that_cannot_be_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("gloo", bind_host=host, secret=SECRET, identity="expert-host-0")


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536"])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="write host:port"):
        split_endpoint(endpoint)


def test_ipv6_endpoints() -> None:
    assert split_endpoint("[::1]:80") == ("::1", 80)


def test_a_short_secret_is_refused_by_every_kind(kind: LinkKind) -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        listen(kind, bind_host="127.0.0.1", secret=b"short", identity="expert-host-0")


def test_shm_on_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="use gloo or nccl"):
        dial(LinkAddress("shm", "x", "another boot id"), secret=SECRET, identity="router-0", deadline=soon())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'carrier pigeon': use"):
        listen("carrier pigeon", bind_host="127.0.0.1", secret=SECRET, identity="x")  # type: ignore[arg-type]
