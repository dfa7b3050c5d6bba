from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from moray.actors.deadline import Deadline
from moray.actors.links import handshake
from moray.actors.links.handshake import authenticate, authenticate_async
from moray.configs.errors import ConfigError, HandshakeError, LinkError, PeerDiedError, PeerTimeoutError

SECRET = b"the secret of the link tests"
OTHER_SECRET = b"the secret of another cluster"
Sockets = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["unix stream", "unix seqpacket", "tcp"])
def sockets(request: pytest.FixtureRequest) -> Iterator[Sockets]:
    if request.param == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as server:
            first = socket.create_connection(server.getsockname())
            second, _ = server.accept()
    else:
        type = socket.SOCK_STREAM if request.param == "unix stream" else socket.SOCK_SEQPACKET
        first, second = socket.socketpair(socket.AF_UNIX, type)
    with first, second:
        yield first, second


def run(sockets: Sockets, initiator: dict[str, Any], acceptor: dict[str, Any]) -> tuple[Any, Any]:
    """Both ends' results: the peer's identity, or the exception."""

    def end(sock: socket.socket, is_initiator: bool, changes: dict[str, Any]) -> str:
        arguments: dict[str, Any] = {
            "secret": SECRET,
            "identity": "router-0" if is_initiator else "expert-host-2",
            "channel": "link/shm",
            "deadline": Deadline.after(20),
        } | changes
        try:
            return authenticate(sock, initiator=is_initiator, **arguments)
        except LinkError:
            sock.shutdown(socket.SHUT_RDWR)
            raise

    with ThreadPoolExecutor(2) as pool:
        futures = pool.submit(end, sockets[0], True, initiator), pool.submit(end, sockets[1], False, acceptor)
        first, second = (future.exception(30) or future.result() for future in futures)
    return first, second


def test_each_end_learns_the_others_identity(sockets: Sockets) -> None:
    assert run(sockets, {}, {}) == ("expert-host-2", "router-0")


def test_the_socket_keeps_its_mode_and_nothing_is_read_ahead(sockets: Sockets) -> None:
    sockets[0].settimeout(7.5)
    run(sockets, {}, {})
    assert sockets[0].gettimeout() == 7.5
    assert sockets[1].gettimeout() is None
    sockets[0].send(b"first bytes of the protocol above")
    assert sockets[1].recv(100) == b"first bytes of the protocol above"


@pytest.mark.parametrize("liar", ["initiator", "acceptor"])
def test_another_secret_is_refused_on_both_ends(sockets: Sockets, liar: str) -> None:
    wrong = {"secret": OTHER_SECRET}
    here, there = run(sockets, wrong if liar == "initiator" else {}, wrong if liar == "acceptor" else {})
    assert isinstance(there, HandshakeError)
    assert "does not know the secret" in str(there)
    assert isinstance(here, HandshakeError)
    assert "the secrets differ" in str(here)
    assert not any(secret.decode() in repr(error) for error in (here, there) for secret in (SECRET, OTHER_SECRET))


def test_another_kind_of_connection_is_refused(sockets: Sockets) -> None:
    here, there = run(sockets, {"channel": "front"}, {})
    assert isinstance(here, HandshakeError)
    assert isinstance(there, HandshakeError)
    assert "'front', this is 'link/shm'" in str(there)


def test_another_version_is_refused(sockets: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    greeting = handshake._MESSAGE.pack(b"MORAY-HS", 2, 1, 0, b"link/shm", b"router-9", bytes(32), bytes(32))
    sockets[0].send(greeting)
    with pytest.raises(HandshakeError, match="protocol version 2, this side 1"):
        accept(sockets[1])


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", b"\0", b"MORAY-HX" + bytes(200)])
def test_garbage_is_refused_at_once(sockets: Sockets, garbage: bytes) -> None:
    sockets[0].send(garbage)
    with pytest.raises(HandshakeError, match="does not speak Moray's handshake"):
        accept(sockets[1])


def test_a_step_out_of_order_is_refused(sockets: Sockets) -> None:
    sockets[0].send(handshake._MESSAGE.pack(b"MORAY-HS", 1, 4, 0, b"link/shm", b"x", bytes(32), bytes(32)))
    with pytest.raises(HandshakeError, match="WELCOME where HELLO belongs"):
        accept(sockets[1])


def test_an_unknown_step_is_refused(sockets: Sockets) -> None:
    sockets[0].send(handshake._MESSAGE.pack(b"MORAY-HS", 1, 77, 0, b"link/shm", b"x", bytes(32), bytes(32)))
    with pytest.raises(HandshakeError, match="unknown type 77"):
        accept(sockets[1])


def test_an_identity_that_would_garble_logs_is_refused(sockets: Sockets) -> None:
    sockets[0].send(handshake._MESSAGE.pack(b"MORAY-HS", 1, 1, 0, b"link/shm", b"a\nb", bytes(32), bytes(32)))
    with pytest.raises(HandshakeError, match=r"calls itself 'a\\nb'"):
        accept(sockets[1])


def test_an_echoing_peer_learns_nothing_it_can_use(sockets: Sockets) -> None:
    """Reflecting this side's own messages must not authenticate: they are the wrong steps with the wrong labels."""

    def reflect() -> None:
        with contextlib.suppress(OSError):  # the other end hangs up when it has seen enough
            while data := sockets[1].recv(4096):
                sockets[1].send(data)

    with ThreadPoolExecutor(1) as pool:
        reflecting = pool.submit(reflect)
        with pytest.raises(HandshakeError, match="HELLO where CHALLENGE belongs"):
            authenticate(
                sockets[0], secret=SECRET, identity="a", channel="x", initiator=True, deadline=Deadline.after(20)
            )
        sockets[0].shutdown(socket.SHUT_RDWR)
        reflecting.result(20)


def test_a_proof_cannot_be_replayed(sockets: Sockets) -> None:
    """The same HELLO and PROOF, recorded, fail against a fresh challenge."""
    recorded: list[bytes] = []
    with ThreadPoolExecutor(1) as pool:
        for replay in (False, True):
            first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with first, second:
                accepting = pool.submit(accept, second)
                if replay:
                    first.send(recorded[0])
                    first.recv(4096)
                    first.send(recorded[1])
                    assert isinstance(accepting.exception(20), HandshakeError)
                else:
                    tapped = _Tap(first, recorded)
                    authenticate(
                        tapped,  # type: ignore[arg-type]
                        secret=SECRET,
                        identity="router-0",
                        channel="link/shm",
                        initiator=True,
                        deadline=Deadline.after(20),
                    )
                    assert accepting.result(20) == "router-0"


def test_a_proof_cannot_be_passed_on_to_another_place() -> None:
    """Who listens where a process of ours did cannot hand our messages to another one, to read along ever after."""
    with (
        socket.create_server(("127.0.0.1", 0)) as honest,
        socket.create_server(("127.0.0.1", 0)) as relay,
        ThreadPoolExecutor(3) as pool,
        socket.create_connection(relay.getsockname()) as router,
        socket.create_connection(honest.getsockname()) as onwards,
    ):
        host, _ = honest.accept()
        inwards, _ = relay.accept()
        with host, inwards:
            pool.submit(_pump, inwards, onwards)
            pool.submit(_pump, onwards, inwards)
            accepting = pool.submit(accept, host)
            with pytest.raises(HandshakeError, match="the secrets differ"):
                authenticate(
                    router, secret=SECRET, identity="r", channel="link/shm", initiator=True, deadline=Deadline.after(20)
                )
            assert isinstance(accepting.exception(20), HandshakeError)
            for sock in (router, host):
                sock.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)


class _Tap:
    """A socket that remembers what was sent through it."""

    def __init__(self, sock: socket.socket, recorded: list[bytes]) -> None:
        self._sock = sock
        self._recorded = recorded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        self._recorded.append(bytes(data))
        return self._sock.send(data)


def test_a_silent_peer_is_a_timeout(sockets: Sockets) -> None:
    with pytest.raises(PeerTimeoutError):
        accept(sockets[1], deadline=Deadline.after(0.05))


def test_a_peer_that_hangs_up_has_died(sockets: Sockets) -> None:
    sockets[0].close()
    with pytest.raises(PeerDiedError):
        accept(sockets[1])


def test_a_short_secret_and_a_bad_identity_are_configuration_errors(sockets: Sockets) -> None:
    with pytest.raises(ConfigError, match="has 5 bytes; it needs at least 16") as caught:
        accept(sockets[1], secret=b"hello")
    assert "hello" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot name an end"):
        accept(sockets[1], identity="a b")


def test_an_event_loop_can_authenticate_and_take_over(sockets: Sockets) -> None:
    async def end(sock: socket.socket, initiator: bool) -> str:
        peer = await authenticate_async(
            sock,
            secret=SECRET,
            identity="front-1" if initiator else "router-0",
            channel="front",
            initiator=initiator,
            deadline=Deadline.after(20),
        )
        assert sock.gettimeout() == 0
        return peer

    async def both() -> list[str]:
        return list(await asyncio.gather(end(sockets[0], True), end(sockets[1], False)))

    assert asyncio.run(both()) == ["router-0", "front-1"]


def accept(
    sock: socket.socket, *, secret: bytes = SECRET, identity: str = "expert-host-2", deadline: Deadline | None = None
) -> str:
    return authenticate(
        sock,
        secret=secret,
        identity=identity,
        channel="link/shm",
        initiator=False,
        deadline=deadline or Deadline.after(20),
    )
