"""Waiting on non-blocking sockets with deadlines, and the socket options that make a vanished peer visible."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from ...configs.errors import ConfigError, PeerDiedError, PeerTimeoutError
from ..deadline import Deadline

PEER_VANISHED_S: Final = 5
"""Seconds after which a host that stopped answering on the network counts as dead."""

_SPIN_S: Final = 30e-6
"""How long a wait may look again and again before it sleeps: about what being woken costs."""

_LONGEST_REST: Final = 64
"""Waits between two tries of a spin that has never paid: it then costs less than a microsecond a wait."""

_HUNG_UP = select.POLLHUP | select.POLLRDHUP | select.POLLERR | select.POLLNVAL


class SocketWaiter:
    """Waits for one socket. Not for concurrent use; `shutdown` of the socket by another thread ends a wait at once."""

    def __init__(self, sock: socket.socket) -> None:
        fd = sock.fileno()
        self._readable = select.poll()
        self._readable.register(fd, select.POLLIN | select.POLLRDHUP)
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)
        self._hang_up = select.poll()
        self._hang_up.register(fd, select.POLLRDHUP)

    def readable(self, deadline: Deadline) -> bool:
        """Whether there is something to read before the deadline: bytes, end of file or an error."""
        return bool(self._readable.poll(milliseconds(deadline)))

    def readable_now(self) -> bool:
        """Whether there is something to read. Never blocks."""
        return bool(self._readable.poll(0))

    def writable(self, deadline: Deadline) -> bool:
        """Whether a write would make progress, or fail, before the deadline."""
        return bool(self._writable.poll(milliseconds(deadline)))

    def hung_up(self) -> bool:
        """Whether the other end is closed or the connection broken. Never blocks."""
        return any(events & _HUNG_UP for _, events in self._hang_up.poll(0))


class Spin:
    """Whether to look again and again for a while before sleeping: as long as that pays.

    Who is answered within microseconds is answered sooner if it does not sleep. But the core that it spins on may be what the
    other end waits for, and then it never is: each wait that was spun on in vain doubles the waits that are not.
    """

    def __init__(self) -> None:
        self._rest = 0  # waits until it is tried again
        self._next_rest = 1

    def worth_it(self) -> bool:
        """Whether the wait that begins should spin."""
        if self._rest:
            self._rest -= 1
            return False
        return True

    def ended(self, *, answered: bool) -> None:
        """How a spin has ended."""
        if answered:
            self._next_rest = 1
        else:
            self._rest, self._next_rest = self._next_rest, min(_LONGEST_REST, 2 * self._next_rest)

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Spin until it is `ready`, if that is worth it; False if it is to be slept for."""
        if not self.worth_it():
            return False
        until = time.monotonic() + _SPIN_S
        answered = ready()
        while not answered and time.monotonic() < until:
            answered = ready()
        self.ended(answered=answered)
        return answered


def milliseconds(deadline: Deadline) -> int:
    """What is left in whole milliseconds, rounded up so that no wait ends early; at most a day."""
    return min(86_400_000, math.ceil(deadline.remaining() * 1000))


def send_all(sock: socket.socket, waiter: SocketWaiter, data: bytes, *, deadline: Deadline, peer: str) -> None:
    """Write all of `data` to a non-blocking socket.

    Raises:
        PeerDiedError: the connection is gone.
        PeerTimeoutError: the peer did not take the bytes before the deadline.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            if not waiter.writable(deadline):
                raise PeerTimeoutError(peer, f"took none of the last {len(view)} bytes before the deadline") from None
        except OSError as error:
            raise PeerDiedError(peer, f"connection lost while sending ({error.strerror})") from error


def recv_exactly(sock: socket.socket, waiter: SocketWaiter, size: int, *, deadline: Deadline, peer: str) -> bytes:
    """Read exactly `size` bytes from a non-blocking stream socket.

    Raises:
        PeerDiedError: the connection ended before that.
        PeerTimeoutError: the bytes did not arrive before the deadline.
    """
    data = bytearray(size)
    recv_into(sock, waiter, memoryview(data), deadline=deadline, peer=peer)
    return bytes(data)


def recv_into(sock: socket.socket, waiter: SocketWaiter, buffer: memoryview, *, deadline: Deadline, peer: str) -> None:
    """Fill `buffer`; otherwise as `recv_exactly`."""
    while buffer:
        buffer = buffer[recv_some_into(sock, waiter, buffer, deadline=deadline, peer=peer) :]


def recv_some_into(
    sock: socket.socket, waiter: SocketWaiter, buffer: memoryview, *, deadline: Deadline, peer: str
) -> int:
    """Read at least one byte into a `buffer` of at least one, and return how many; otherwise as `recv_exactly`."""
    while True:
        try:
            count = sock.recv_into(buffer)
        except BlockingIOError:
            if not waiter.readable(deadline):
                raise PeerTimeoutError(peer, "sent nothing before the deadline") from None
            continue
        except OSError as error:
            raise PeerDiedError(peer, f"connection lost ({error.strerror})") from error
        if not count:
            raise PeerDiedError(peer, "closed the connection")
        return count


def shut_down(sock: socket.socket) -> None:
    """End both directions: the peer reads end of file and waits in this process wake. Never raises."""
    with contextlib.suppress(OSError):  # not connected any more, or already closed: nothing left to end
        sock.shutdown(socket.SHUT_RDWR)


def make_peer_loss_visible(sock: socket.socket) -> None:
    """TCP only: send small messages at once; fail within `PEER_VANISHED_S` when the peer's host or network is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PEER_VANISHED_S - 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_VANISHED_S * 1000)


def listen_tcp(host: str, *, port: int = 0) -> socket.socket:
    """Listen on one address of this machine; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be bound, or is a wildcard, which nobody could dial.
    """
    if host in ("", "0.0.0.0", "::"):
        raise ConfigError(f"cannot listen for links on {host!r}: give the address of the interface peers reach")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host!r} port {port}: {error.strerror or error}") from error


def dial_tcp(endpoint: str, *, deadline: Deadline) -> socket.socket:
    """Connect to `host:port` (or `[v6]:port`), with `make_peer_loss_visible` applied.

    Raises:
        PeerDiedError: nobody listens there.
        PeerTimeoutError: no answer before the deadline.
        ConfigError: `endpoint` is not `host:port`.
    """
    host, port = split_endpoint(endpoint)
    try:
        sock = socket.create_connection((host, port), timeout=max(deadline.remaining(), 0.001))
    except TimeoutError:
        raise PeerTimeoutError(endpoint, "did not accept the connection before the deadline") from None
    except OSError as error:
        raise PeerDiedError(endpoint, f"cannot be reached ({error.strerror or error})") from error
    make_peer_loss_visible(sock)
    return sock


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """`host:port` or `[v6 host]:port` as a pair; `ConfigError` if it is neither."""
    host, colon, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{endpoint!r} is not an endpoint: write host:port")
    return host, int(port)


def endpoint_of(sock: socket.socket) -> str:
    """The local address of a TCP socket in the form that `dial_tcp` takes."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
