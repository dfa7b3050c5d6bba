"""Accepts connections and authenticates each in a thread of its own: one that says nothing delays no other.

What strangers can cost is bounded: `MAX_HANDSHAKES` threads and descriptors, each for `HANDSHAKE_TIMEOUT_S` at most, and
some lines of the log. Those who hold the secret count no more once they have shown that they do.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from ...configs.errors import LinkError
from ..deadline import Deadline
from .handshake import authenticate, check_identity, check_secret
from .sockets import milliseconds, shut_down

T = TypeVar("T")

HANDSHAKE_TIMEOUT_S: Final = 3.0
"""A peer of ours answers in milliseconds; this leaves room for one whose machine is loading a checkpoint."""

ESTABLISH_TIMEOUT_S: Final = 30.0
"""For what follows a good handshake: NCCL alone takes seconds to set up."""

MAX_HANDSHAKES: Final = 64
"""Handshakes in progress at a time; each costs one thread. One more takes the place of the oldest of whoever has most: a peer
of ours is through in milliseconds, and connections that say nothing make room for it."""

_MAKE_ROOM_S: Final = 1.0
"""For the thread of a connection that was dropped to end, which takes it microseconds."""

_LOGGED: Final = 20
_LOGGED_PER_S: Final = 10.0
"""So many refusals are logged one by one in so many seconds, and the rest in one line: nobody fills a disk by knocking."""

_CREDENTIALS = struct.Struct("3i")

logger = logging.getLogger("moray.links")


@dataclass(slots=True)
class _Stranger:
    """A connection whose handshake is in progress.

    Attributes:
        source: whom it counts for: an address, or a user of this machine.
        crowded_out: it was dropped to make room.
    """

    sock: socket.socket
    source: str
    crowded_out: bool = False


class Acceptor(Generic[T]):
    """Turns incoming connections into `T`s, for links and for any other channel between Moray's processes.

    Args:
        listening: a listening stream or seqpacket socket; owned by the acceptor from now on.
        secret, identity, channel: as in `authenticate`.
        establish: makes a `T` of an authenticated socket, given the peer's identity and a deadline; runs in the
            connection's thread and owns the socket once it returns. On an error the acceptor closes the socket.
        discard: closes a `T` that was made but never accepted.
    """

    def __init__(
        self,
        listening: socket.socket,
        *,
        secret: bytes,
        identity: str,
        channel: str,
        establish: Callable[[socket.socket, str, Deadline], T],
        discard: Callable[[T], None],
    ) -> None:
        check_secret(secret)
        check_identity(identity)
        self._listening = listening
        self._secret = secret
        self._identity = identity
        self._channel = channel
        self._establish = establish
        self._discard = discard
        self._changed = threading.Condition()
        self._ready: deque[T] = deque()
        self._strangers: dict[threading.Thread, _Stranger] = {}  # in the order in which they came
        self._peers: dict[threading.Thread, socket.socket] = {}  # authenticated; `establish` has them
        self._refusals = _Refusals(identity)
        self._closed = False
        listening.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"moray-accept-{identity}", daemon=True)
        self._thread.start()

    def accept(self, *, deadline: Deadline) -> T | None:
        """The next one established; None when the deadline passed, or the acceptor was closed, with none."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed, timeout=deadline.remaining())
            return self._ready.popleft() if self._ready and not self._closed else None

    def close(self) -> None:
        """Stop listening, give up handshakes in progress, discard what nobody accepted. Idempotent; milliseconds."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            ready, self._ready = self._ready, deque()
            threads = [*self._strangers, *self._peers]
            for sock in [*(stranger.sock for stranger in self._strangers.values()), *self._peers.values()]:
                shut_down(sock)
            self._changed.notify_all()
        os.eventfd_write(self._wake, 1)
        for item in ready:
            self._discard(item)
        self._thread.join()
        for thread in threads:
            thread.join(timeout=HANDSHAKE_TIMEOUT_S)
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        pause = select.poll()
        pause.register(self._wake, select.POLLIN)
        with self._listening:
            while not self._closed:
                poll.poll()
                try:
                    sock, remote = self._listening.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue  # the peer went away again, or it was the wake-up
                except OSError as error:
                    # Out of descriptors or memory: the connection stays in the backlog, so wait instead of spinning.
                    logger.error("cannot accept a connection for %s: %s", self._identity, error)
                    pause.poll(milliseconds(Deadline.after(0.2)))
                    continue
                self._begin(sock, remote)

    def _begin(self, sock: socket.socket, remote: object) -> None:
        source, name = _source(sock, remote)
        with self._changed:
            refusal = self._start(sock, source, name)
        if refusal is not None:
            sock.close()
            self._refusals.log(f"dropped a connection from {name}: {refusal}")

    def _start(self, sock: socket.socket, source: str, name: str) -> str | None:
        """Begin a handshake, or say why not; the lock is held."""
        if not self._make_room():
            return "it is closing" if self._closed else f"{MAX_HANDSHAKES} handshakes in progress"
        stranger = _Stranger(sock, source)
        thread = threading.Thread(
            target=self._welcome, args=(stranger, name), name=f"moray-handshake-{name}", daemon=True
        )
        self._strangers[thread] = stranger
        try:
            thread.start()
        except RuntimeError as error:  # the process has no threads left
            del self._strangers[thread]
            return str(error)
        return None

    def _make_room(self) -> bool:
        """Whether there is room for one more stranger; the lock is held."""
        if len(self._strangers) >= MAX_HANDSHAKES:
            counts = Counter(stranger.source for stranger in self._strangers.values())
            crowd, _ = counts.most_common(1)[0]
            oldest = next(stranger for stranger in self._strangers.values() if stranger.source == crowd)
            oldest.crowded_out = True
            shut_down(oldest.sock)
            self._refusals.log(f"dropped a connection of {crowd}: {MAX_HANDSHAKES} handshakes in progress")
            self._changed.wait_for(lambda: self._closed or len(self._strangers) < MAX_HANDSHAKES, timeout=_MAKE_ROOM_S)
        return not self._closed and len(self._strangers) < MAX_HANDSHAKES

    def _welcome(self, stranger: _Stranger, remote: str) -> None:
        item: T | None = None
        sock, me = stranger.sock, threading.current_thread()
        try:
            peer = authenticate(
                sock,
                secret=self._secret,
                identity=self._identity,
                channel=self._channel,
                initiator=False,
                deadline=Deadline.after(HANDSHAKE_TIMEOUT_S),
                remote=remote,
            )
            with self._changed:
                del self._strangers[me]
                self._peers[me] = sock
                self._changed.notify_all()
            item = self._establish(sock, peer, Deadline.after(ESTABLISH_TIMEOUT_S))
        except LinkError as error:
            if not (self._closed or stranger.crowded_out):
                self._refusals.log(f"refused a connection: {error}")
        except Exception:  # a thread has nobody to raise to: the log is where a bug must show
            logger.exception("%s could not set up a connection from %s", self._identity, remote)
        finally:
            if item is None:
                sock.close()  # before it is counted out, so that there are never more descriptors than are counted
            with self._changed:
                self._strangers.pop(me, None)
                self._peers.pop(me, None)
                if item is not None and not self._closed:
                    self._ready.append(item)
                    item = None
                self._changed.notify_all()
            if item is not None:
                self._discard(item)


class _Refusals:
    """Logs refusals, up to a rate. Any thread."""

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._lock = threading.Lock()
        self._since = -_LOGGED_PER_S
        self._count = 0

    def log(self, what: str) -> None:
        """One line, unless there were too many lately."""
        with self._lock:
            now = time.monotonic()
            if now - self._since >= _LOGGED_PER_S:
                if self._count > _LOGGED:
                    logger.warning("%s refused %d more connections", self._identity, self._count - _LOGGED)
                self._since, self._count = now, 0
            self._count += 1
            if self._count <= _LOGGED:
                logger.warning("%s %s", self._identity, what)


def _source(sock: socket.socket, remote: object) -> tuple[str, str]:
    """Whom a connection counts for, and its name in the log."""
    if isinstance(remote, tuple):
        host, port = remote[:2]
        return str(host), f"{host}:{port}"
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return f"user {user}", f"a process of user {user} on this machine"
