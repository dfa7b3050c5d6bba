"""The router's side of the front channel: takes requests from fronts, sends each one message a step."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable

from ..configs.errors import LinkError, MorayError, PeerDiedError, PeerTimeoutError
from . import front_channel
from .deadline import Deadline
from .heartbeat import Heartbeat, Silence
from .links.acceptor import Acceptor
from .links.sockets import SocketWaiter, endpoint_of, listen_tcp, recv_some_into, send_all, shut_down
from .messages import TokenOutput
from .router import Router

logger = logging.getLogger("moray.router")

_ACCEPT_POLL_S = 1.0
_SEND_TIMEOUT_S = 20.0
"""A front that takes nothing for this long is stuck, though it says that it lives; its requests are cancelled so that they
hold no pages."""

_MAX_QUEUED_MESSAGES = 4096
"""Steps a slow front may lag behind before it counts as stuck."""

_READ_BYTES = 256 << 10

_REMEMBER_SILENT_S = 60.0
"""How long a front that fell silent is named. By then it has come back under its name, or was replaced under another."""


class RouterServer:
    """Listens for fronts on `bind_host`, on a port of the system's choice; `address` says which.

    Args:
        heartbeat: how often fronts are told that this router lives, and how long one may be silent before it is dropped.
        remember_silent_s: how long `silent_fronts` names a front that does not connect again.
    """

    def __init__(
        self,
        router: Router,
        *,
        bind_host: str,
        secret: bytes,
        heartbeat: Heartbeat = front_channel.OF_FRONTS,
        remember_silent_s: float = _REMEMBER_SILENT_S,
    ) -> None:
        self._router = router
        self._remember_silent_s = remember_silent_s
        listening = listen_tcp(bind_host)
        self.address = endpoint_of(listening)
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the next two
        self._fronts: set[_FrontConnection] = set()
        self._silent: dict[str, float] = {}  # front -> when it was dropped
        self._acceptor = Acceptor[_FrontConnection](
            listening,
            secret=secret,
            identity=router.router_id,
            channel=front_channel.CHANNEL,
            establish=lambda sock, peer, _: _FrontConnection(sock, peer, router, heartbeat, self._fell_silent),
            discard=lambda front: front.discard(),
        )
        self._thread = threading.Thread(target=self._accept, name=f"{router.router_id}-fronts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and drop every front. Idempotent."""
        self._stopping.set()
        self._acceptor.close()
        self._thread.join(2 * _ACCEPT_POLL_S)
        with self._lock:
            fronts = list(self._fronts)
        for front in fronts:
            front.close()

    def silent_fronts(self) -> tuple[str, ...]:
        """Fronts that were dropped lately because they had stopped answering or reading, and have not come back."""
        now = time.monotonic()
        with self._lock:
            self._silent = {f: at for f, at in self._silent.items() if now - at < self._remember_silent_s}
            return tuple(sorted(self._silent))

    def _fell_silent(self, front: _FrontConnection) -> None:
        with self._lock:
            # Else it has connected again before this connection was noticed to be dead.
            if not any(other.peer == front.peer for other in self._fronts if other is not front and not other.closed):
                self._silent[front.peer] = time.monotonic()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            front = self._acceptor.accept(deadline=Deadline.after(_ACCEPT_POLL_S))
            if self._router.closed is not None:
                # It would refuse every request: fronts are better off with a port that nobody answers.
                self._acceptor.close()
                if front is not None:
                    front.discard()
                return
            if front is not None:
                with self._lock:
                    self._fronts = {f for f in self._fronts if not f.closed} | {front}
                    self._silent.pop(front.peer, None)
                front.start()


class _FrontConnection:
    """One front: a thread that reads its requests and one that writes what the steps produce.

    Args:
        on_silent: called, from any thread, when the front has stopped answering or reading and is dropped for it.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        router: Router,
        heartbeat: Heartbeat,
        on_silent: Callable[[_FrontConnection], None],
    ) -> None:
        sock.setblocking(False)
        # A step's message must not wait for the acknowledgement of the last one's.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self.peer = peer
        self._router = router
        self._heartbeat = heartbeat
        self._on_silent = on_silent
        self._outbox: queue.SimpleQueue[bytes | list[TokenOutput] | None] = queue.SimpleQueue()
        self._mine: set[str] = set()
        self._lock = threading.Lock()
        self.closed = False

    def start(self) -> None:
        """Begin to serve the front."""
        logger.info("%s: front %s connected", self._router.router_id, self.peer)
        threading.Thread(target=self._read, name=f"{self.peer}-read", daemon=True).start()
        threading.Thread(target=self._write, name=f"{self.peer}-write", daemon=True).start()

    def close(self) -> None:
        """Drop the front and cancel its requests. Idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            mine, self._mine = self._mine, set()
        # First of all: a front that heard of the cancellations would take its requests for ended, not go on elsewhere.
        shut_down(self._sock)
        for request_id in mine:
            self._router.cancel(request_id)
        self._post(None)

    def discard(self) -> None:
        """Close a connection that was never started."""
        self.close()
        self._sock.close()

    def sink(self, outputs: list[TokenOutput]) -> None:
        """Take a step's outputs; costs the router's thread next to nothing, for the writer's thread does the rest."""
        # A router that has ended fails what is left: these requests have not failed, another router can go on with them.
        ending = self._router.closed
        self._post(outputs if ending is None else front_channel.encode(["ending", ending]))

    def _post(self, message: bytes | list[TokenOutput] | None) -> None:
        if self._outbox.qsize() >= _MAX_QUEUED_MESSAGES and message is not None:
            if not self.closed:
                self._stuck(f"it has left {_MAX_QUEUED_MESSAGES} messages unread")
            # Not `close`: it would take the router's own locks again. The reader sees the end and closes.
            shut_down(self._sock)
            return
        self._outbox.put(message)

    def _read(self) -> None:
        waiter = SocketWaiter(self._sock)
        buffer = memoryview(bytearray(_READ_BYTES))
        arriving = front_channel.MessageBuffer()
        silence = Silence(self._heartbeat)
        try:
            while not self.closed:
                look = Deadline.after(silence.next_look_s)
                try:
                    count = recv_some_into(self._sock, waiter, buffer, deadline=look, peer=self.peer)
                except PeerTimeoutError:
                    if silence.too_long():
                        self._silent(silence.seconds)
                        return
                    continue
                silence.heard()
                for message in arriving.feed(bytes(buffer[:count])):
                    self._handle(message)
        except PeerDiedError:
            logger.info("%s: front %s is gone", self._router.router_id, self.peer)
        except (LinkError, ValueError, TypeError, LookupError) as error:
            logger.error("%s: front %s: %s", self._router.router_id, self.peer, error)
        finally:
            self.close()

    def _silent(self, silent_s: float) -> None:
        self._on_silent(self)
        logger.error(
            "event=front_silent router=%s front=%s silent_s=%.3f cancelled=%d",
            self._router.router_id,
            self.peer,
            silent_s,
            len(self._mine),
        )

    def _stuck(self, reason: str) -> None:
        self._on_silent(self)
        logger.error("event=front_stuck router=%s front=%s reason=%r", self._router.router_id, self.peer, reason)

    def _handle(self, message: list[object]) -> None:
        kind = message[0]
        if kind == "alive":
            pass  # that it arrived is all there is to it
        elif kind == "generate":
            request = front_channel.request_from(message)
            with self._lock:
                if request.request_id in self._mine:
                    raise ValueError(f"request {request.request_id!r} is in flight already")
                self._mine.add(request.request_id)
            try:
                self._router.submit(request, self.sink)
            except MorayError as error:
                with self._lock:
                    self._mine.discard(request.request_id)
                self._post(front_channel.encode(front_channel.refusal_message(request.request_id, error)))
            else:
                self._post(front_channel.encode(["accepted", request.request_id]))
            if self.closed:  # meanwhile: `close` may have cancelled before there was anything to cancel
                self._router.cancel(request.request_id)
        elif kind == "cancel":
            request_id = message[1]
            with self._lock:
                mine = isinstance(request_id, str) and request_id in self._mine
            if mine:
                self._router.cancel(str(request_id))
        elif kind == "stats" and isinstance(message[1], int):
            self._post(front_channel.encode(front_channel.stats_message(message[1], self._router.stats())))
        else:
            raise ValueError(f"unknown message {kind!r}")

    def _write(self) -> None:
        waiter = SocketWaiter(self._sock)
        try:
            while (data := self._next_message()) is not None:
                send_all(self._sock, waiter, data, deadline=Deadline.after(_SEND_TIMEOUT_S), peer=self.peer)
        except PeerTimeoutError as error:
            self._stuck(str(error))
        except PeerDiedError:
            pass  # the reader sees it too, and says so
        finally:
            self.close()
            self._sock.close()

    def _next_message(self) -> bytes | None:
        """What is to be sent next; a heartbeat where there is nothing else, None at the end."""
        try:
            message = self._outbox.get(timeout=self._heartbeat.every_s)
        except queue.Empty:
            return front_channel.ALIVE
        if not isinstance(message, list):
            return message
        ended = [output.request_id for output in message if output.finish_reason is not None]
        if ended:
            with self._lock:
                self._mine.difference_update(ended)
        return front_channel.encode(front_channel.outputs_message(message))
