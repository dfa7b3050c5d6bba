"""Connections of those who do not hold the secret, or did once: what they send, and all that they get."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moray.actors.deadline import Deadline
from moray.actors.links import handshake
from moray.actors.links.handshake import authenticate

from .processes import Place

CLOSED_WITHIN_S = 20.0
"""Handshakes end after 3 s; a loaded machine takes its time to notice."""

HELLO, CHALLENGE, PROOF, REFUSED = 1, 2, 3, 5


def message(step: int, channel: str, *, mac: bytes = b"", nonce: bytes = b"") -> bytes:
    return handshake._MESSAGE.pack(b"MORAY-HS", 1, step, 0, channel.encode(), b"router-0", nonce, mac)


@dataclass(frozen=True)
class Told:
    """What a stranger got: bytes, and after how long the connection was closed."""

    data: bytes
    seconds: float


def connected(place: Place) -> socket.socket:
    if place.is_unix:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(CLOSED_WITHIN_S)
        sock.connect("\0" + place.host.removeprefix("@"))
        return sock
    return socket.create_connection((place.host, place.port), CLOSED_WITHIN_S)


def tell(place: Place, *parts: bytes) -> Told:
    """Send each part after something was heard of the one before, as far as it goes, and listen to the end."""
    began = time.monotonic()
    heard = b""
    with connected(place) as sock, contextlib.suppress(ConnectionError):
        for number, part in enumerate(parts):
            if number:
                heard += sock.recv(1 << 16)
            sock.send(part)
        while more := sock.recv(1 << 16):
            heard += more
    return Told(heard, time.monotonic() - began)


def crowd(place: Place, size: int) -> list[Told]:
    """So many connections at once that say nothing."""

    def wait(sock: socket.socket) -> Told:
        began = time.monotonic()
        with sock, contextlib.suppress(ConnectionError):
            return Told(sock.recv(1 << 16), time.monotonic() - began)
        return Told(b"", time.monotonic() - began)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(wait, [connected(place) for _ in range(size)]))


class Recorder:
    """A socket that keeps what was sent through it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sent: list[bytes] = []
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        self.sent.append(bytes(data))
        return self._sock.send(data)


def recorded(place: Place, channel: str, secret: bytes) -> list[bytes]:
    """HELLO and PROOF of somebody who holds the secret."""
    with connected(place) as sock:
        tapped = Recorder(sock)
        authenticate(
            tapped,  # type: ignore[arg-type]
            secret=secret,
            identity="router-99",
            channel=channel,
            initiator=True,
            deadline=Deadline.after(CLOSED_WITHIN_S),
        )
        return tapped.sent


def attacks(place: Place, channel: str, recording: list[bytes]) -> dict[str, Told]:
    """Everything that a stranger may try on one connection, and what it brought."""
    wrong = message(PROOF, channel, mac=os.urandom(32))
    return {
        "http": tell(place, b"GET /v1/models HTTP/1.1\r\nHost: moray\r\n\r\n"),
        "random bytes": tell(place, os.urandom(4096)),
        "a length": tell(place, b"\xff" * 8),
        "a msgpack bomb": tell(place, b"\xdd\xff\xff\xff\xff" * 1000),
        "a pickle": tell(place, b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        "half a hello": tell(place, message(HELLO, channel)[:60]),
        "another channel": tell(place, message(HELLO, "front/other")),
        "a hello and too much": tell(place, message(HELLO, channel) + b"\xff" * 60_000),
        "a wrong proof": tell(place, message(HELLO, channel, nonce=os.urandom(32)), wrong),
        "a proof first": tell(place, wrong),
        "a replay": tell(place, *recording),
    }


def refused(told: Told) -> bool:
    """Whether nothing was given away: at most a challenge, which holds a name and random bytes, and a refusal."""
    size = handshake._MESSAGE.size
    steps = [handshake._MESSAGE.unpack_from(told.data, at)[2] for at in range(0, len(told.data) - size + 1, size)]
    return len(told.data) % size == 0 and steps in ([], [REFUSED], [CHALLENGE], [CHALLENGE, REFUSED])
