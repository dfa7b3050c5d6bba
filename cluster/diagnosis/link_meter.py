"""Measures the way between two nodes with plain TCP sockets: round trips, the clocks' offset, bytes a second.

A server on one node, a client on the other. Both prove that they hold the secret of this examination (`actors/links/handshake`)
before anything else is read, as Moray's links do. What follows is requests of one fixed size from the client:

    PING                     ->
                             <-     the server's clock when the request came in, and when the answer went out
    FLOOD  warm-up           ->
    block, block, ..., last  ->
                             <-     bytes received after the warm-up, and when the first and the last of them came

Bytes are counted where they arrive: those in the sender's buffers have not travelled. The offset of the clocks is that of the
quickest round trip, as in NTP (RFC 5905): the answer came in the middle of it, give or take half of it.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from ...actors.deadline import Deadline
from ...actors.links.acceptor import Acceptor
from ...actors.links.handshake import authenticate
from ...actors.links.sockets import (
    SocketWaiter,
    dial_tcp,
    endpoint_of,
    listen_tcp,
    make_peer_loss_visible,
    recv_exactly,
    recv_into,
    send_all,
    shut_down,
)
from ...configs.errors import LinkError

STREAMS: Final = 4
"""Connections at a time: one alone is often bound by a core, or by its window; a router has one to each host."""

WARM_UP_S: Final = 0.2
"""Not counted: TCP finds its window first."""

_CHANNEL: Final = "doctor"
_PINGS: Final = 200
_LEAST_PINGS: Final = 10
_PING_S: Final = 0.5
"""As many round trips as fit, but at least `_LEAST_PINGS`, for a median that a few late ones do not move."""

_BLOCK_BYTES: Final = 256 << 10
_DIAL_S: Final = 5.0
_ANSWER_S: Final = 10.0
"""For anything that takes milliseconds on a path that works."""

_DRAIN_S: Final = 20.0
"""For what a slow path still has in its buffers when the sending is over."""

_IDLE_S: Final = 30.0
"""After so long without a request a connection ends."""

_REQUEST = struct.Struct("!BQ")
_PING: Final = 1
_FLOOD: Final = 2
_CLOCKS = struct.Struct("!QQ")
_RECEIVED = struct.Struct("!QQQ")
_BLOCK: Final = bytes(_BLOCK_BYTES)
_LAST_BLOCK: Final = b"\x01" + _BLOCK[1:]


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """The way from one node to another.

    Attributes:
        round_trip_s: median of many.
        least_round_trip_s: the quickest.
        clock_ahead_s: how far the target's clock is ahead, give or take half of the quickest round trip.
        bytes_per_s: from source to target; None where only round trips were measured.
    """

    source: str
    target: str
    round_trip_s: float
    least_round_trip_s: float
    clock_ahead_s: float
    bytes_per_s: float | None


class LinkServer:
    """The end that is measured. Listens on a free port of one address, for holders of the secret, until closed."""

    def __init__(self, address: str, *, secret: bytes, node: str) -> None:
        listening = listen_tcp(address)
        self.endpoint = endpoint_of(listening)
        # Nobody accepts what it has established: connections serve themselves, and its end ends them.
        self._acceptor = Acceptor(
            listening,
            secret=secret,
            identity=f"doctor/{node}",
            channel=_CHANNEL,
            establish=_Served,
            discard=_Served.close,
        )

    def close(self) -> None:
        """End the port and every connection. Idempotent."""
        self._acceptor.close()


class _Served:
    """One connection of a server, in a thread of its own."""

    def __init__(self, sock: socket.socket, peer: str, deadline: Deadline) -> None:  # noqa: ARG002
        make_peer_loss_visible(sock)
        sock.setblocking(False)
        self._sock, self._peer = sock, peer
        self._waiter = SocketWaiter(sock)
        self._thread = threading.Thread(target=self._run, name=f"moray-doctor-{peer}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        shut_down(self._sock)
        self._thread.join(_ANSWER_S)

    def _run(self) -> None:
        # The client's end is the usual way out; it is the client that says what went wrong, if something did.
        with self._sock, contextlib.suppress(LinkError):
            while True:
                request, warm_up_ns = _REQUEST.unpack(self._receive(_REQUEST.size, _IDLE_S))
                if request == _PING:
                    came = time.time_ns()
                    self._send(_CLOCKS.pack(came, time.time_ns()))
                elif request == _FLOOD:
                    self._send(_RECEIVED.pack(*self._swallow(warm_up_ns)))
                else:
                    return

    def _swallow(self, warm_up_ns: int) -> tuple[int, int, int]:
        """Bytes after the warm-up, and the time (ns) of the first and the last of them."""
        block = bytearray(_BLOCK_BYTES)
        view = memoryview(block)
        begin = time.monotonic_ns() + warm_up_ns
        first = last = received = 0
        more = True
        while more:
            recv_into(self._sock, self._waiter, view, deadline=Deadline.after(_ANSWER_S), peer=self._peer)
            more = block[0] == _BLOCK[0]
            now = time.monotonic_ns()
            if not first:
                first = now if now >= begin else 0  # this block came before, or across, the beginning
                continue
            last, received = now, received + _BLOCK_BYTES
        return received, first, last

    def _receive(self, size: int, seconds: float) -> bytes:
        return recv_exactly(self._sock, self._waiter, size, deadline=Deadline.after(seconds), peer=self._peer)

    def _send(self, data: bytes) -> None:
        send_all(self._sock, self._waiter, data, deadline=Deadline.after(_ANSWER_S), peer=self._peer)


def measure_link(
    endpoint: str, *, source: str, target: str, secret: bytes, seconds: float, streams: int = STREAMS
) -> LinkSpeed:
    """Measure the way from here to a `LinkServer`.

    Args:
        endpoint: of the server.
        source, target: names of the two nodes.
        seconds: to send for, after the warm-up; 0 measures round trips alone.
        streams: connections to send on.

    Raises:
        LinkError: it cannot be reached, does not hold the secret, or stopped answering.
    """
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(_Client(endpoint, source=source, target=target, secret=secret))
            for _ in range(streams if seconds else 1)
        ]
        trips, ahead = clients[0].ping()
        rate = _flood(clients, seconds) if seconds else None
    return LinkSpeed(source, target, statistics.median(trips), min(trips), ahead, rate)


class _Client:
    """One connection to a server."""

    def __init__(self, endpoint: str, *, source: str, target: str, secret: bytes) -> None:
        deadline = Deadline.after(_DIAL_S)
        self._peer = target
        self._sock = dial_tcp(endpoint, deadline=deadline)
        try:
            authenticate(
                self._sock,
                secret=secret,
                identity=f"doctor/{source}",
                channel=_CHANNEL,
                initiator=True,
                deadline=deadline,
                remote=f"{target} ({endpoint})",
            )
            self._sock.setblocking(False)
            self._waiter = SocketWaiter(self._sock)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def ping(self) -> tuple[list[float], float]:
        """Round trips in seconds, and how far the server's clock is ahead by the quickest of them."""
        trips: list[float] = []
        quickest, ahead = float("inf"), 0.0
        enough = time.monotonic() + _PING_S
        while len(trips) < _LEAST_PINGS or (len(trips) < _PINGS and time.monotonic() < enough):
            wall, begin = time.time_ns(), time.perf_counter_ns()
            self._send(_REQUEST.pack(_PING, 0))
            came, went = _CLOCKS.unpack(self._receive(_CLOCKS.size))
            there_and_back = time.perf_counter_ns() - begin
            trip = there_and_back - (went - came)
            trips.append(trip / 1e9)
            if trip < quickest:
                quickest = trip
                ahead = ((came + went) / 2 - (wall + there_and_back / 2)) / 1e9
        return trips, ahead

    def flood(self, seconds: float) -> tuple[int, int, int]:
        """Send for so long after the warm-up; what the server says it received, and from when to when (ns)."""
        self._send(_REQUEST.pack(_FLOOD, int(WARM_UP_S * 1e9)))
        end = time.monotonic() + WARM_UP_S + seconds
        while time.monotonic() < end:
            self._send(_BLOCK)
        self._send(_LAST_BLOCK)
        received, first, last = _RECEIVED.unpack(self._receive(_RECEIVED.size, _DRAIN_S))
        return received, first, last

    def _send(self, data: bytes) -> None:
        send_all(self._sock, self._waiter, data, deadline=Deadline.after(_ANSWER_S), peer=self._peer)

    def _receive(self, size: int, seconds: float = _ANSWER_S) -> bytes:
        return recv_exactly(self._sock, self._waiter, size, deadline=Deadline.after(seconds), peer=self._peer)


def _flood(clients: Sequence[_Client], seconds: float) -> float:
    """Bytes a second over all connections together."""
    with ThreadPoolExecutor(len(clients), thread_name_prefix="moray-doctor-flood") as threads:
        floods = [future.result() for future in [threads.submit(client.flood, seconds) for client in clients]]
    counted = [(first, last) for received, first, last in floods if received]
    if not counted:
        return sum(received for received, _, _ in floods) / seconds
    spent = max(1, max(last for _, last in counted) - min(first for first, _ in counted))
    return sum(received for received, _, _ in floods) / (spent / 1e9)
