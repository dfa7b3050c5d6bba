"""Accepts connections and authenticates each in a thread of its own: one that says nothing delays no other."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
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
"""Handshakes in progress at a time; connections beyond it are dropped at once. Each costs one thread."""

logger = logging.getLogger("moray.links")


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
        self._in_progress: dict[threading.Thread, socket.socket] = {}
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
            threads = list(self._in_progress)
            for sock in self._in_progress.values():
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
                self._begin(sock, _describe(remote))

    def _begin(self, sock: socket.socket, remote: str) -> None:
        with self._changed:
            if self._closed or len(self._in_progress) >= MAX_HANDSHAKES:
                if not self._closed:
                    logger.warning("dropped a connection from %s: %d handshakes in progress", remote, MAX_HANDSHAKES)
                sock.close()
                return
            thread = threading.Thread(
                target=self._welcome, args=(sock, remote), name=f"moray-handshake-{remote}", daemon=True
            )
            self._in_progress[thread] = sock
        thread.start()

    def _welcome(self, sock: socket.socket, remote: str) -> None:
        item: T | None = None
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
            item = self._establish(sock, peer, Deadline.after(ESTABLISH_TIMEOUT_S))
        except LinkError as error:
            if not self._closed:
                logger.warning("%s refused a connection: %s", self._identity, error)
        except Exception:  # a thread has nobody to raise to: the log is where a bug must show
            logger.exception("%s could not set up a connection from %s", self._identity, remote)
        finally:
            with self._changed:
                del self._in_progress[threading.current_thread()]
                if item is None:
                    sock.close()
                elif not self._closed:
                    self._ready.append(item)
                    self._changed.notify()
                    item = None
            if item is not None:
                self._discard(item)


def _describe(remote: object) -> str:
    if isinstance(remote, tuple):
        host, port = remote[:2]
        return f"{host}:{port}"
    return "a process on this machine"
