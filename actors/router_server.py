"""The router's side of the front channel: takes requests from fronts, sends each one message a step."""

from __future__ import annotations

import logging
import queue
import socket
import threading

from ..configs.errors import LinkError, MorayError, PeerDiedError, PeerTimeoutError
from . import front_channel
from .deadline import Deadline
from .links.acceptor import Acceptor
from .links.sockets import SocketWaiter, recv_exactly, send_all, shut_down
from .messages import TokenOutput
from .router import Router

logger = logging.getLogger("moray.router")

_IDLE_POLL_S = 1.0
_SEND_TIMEOUT_S = 20.0
"""A front that takes nothing for this long is stuck; its requests are cancelled so that they hold no pages."""

_MAX_QUEUED_MESSAGES = 4096
"""Steps a slow front may lag behind before it counts as stuck."""


class RouterServer:
    """Listens for fronts on `bind_host`, on a port of the system's choice; `address` says which."""

    def __init__(self, router: Router, *, bind_host: str, secret: bytes) -> None:
        self._router = router
        listening = socket.create_server((bind_host, 0), backlog=64)
        self.address = f"{bind_host}:{listening.getsockname()[1]}"
        self._stopping = threading.Event()
        self._fronts: set[_FrontConnection] = set()
        self._fronts_lock = threading.Lock()
        self._acceptor = Acceptor[_FrontConnection](
            listening,
            secret=secret,
            identity=router.router_id,
            channel=front_channel.CHANNEL,
            establish=lambda sock, peer, _: _FrontConnection(sock, peer, router),
            discard=lambda front: front.discard(),
        )
        self._thread = threading.Thread(target=self._accept, name=f"{router.router_id}-fronts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and drop every front. Idempotent."""
        self._stopping.set()
        self._acceptor.close()
        self._thread.join(2 * _IDLE_POLL_S)
        with self._fronts_lock:
            fronts = list(self._fronts)
        for front in fronts:
            front.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            front = self._acceptor.accept(deadline=Deadline.after(_IDLE_POLL_S))
            if self._router.closed is not None:
                # It would refuse every request: fronts are better off with a port that nobody answers.
                self._acceptor.close()
                if front is not None:
                    front.discard()
                return
            if front is not None:
                with self._fronts_lock:
                    self._fronts = {f for f in self._fronts if not f.closed} | {front}
                front.start()


class _FrontConnection:
    """One front: a thread that reads its requests and one that writes what the steps produce."""

    def __init__(self, sock: socket.socket, peer: str, router: Router) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer
        self._router = router
        self._outbox: queue.Queue[bytes | None] = queue.Queue(_MAX_QUEUED_MESSAGES)
        self._mine: set[str] = set()
        self._lock = threading.Lock()
        self.closed = False

    def start(self) -> None:
        """Begin to serve the front."""
        logger.info("%s: front %s connected", self._router.router_id, self._peer)
        threading.Thread(target=self._read, name=f"{self._peer}-read", daemon=True).start()
        threading.Thread(target=self._write, name=f"{self._peer}-write", daemon=True).start()

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
        """Take a step's outputs; never blocks the router."""
        with self._lock:
            self._mine.difference_update(output.request_id for output in outputs if output.finish_reason is not None)
        # A router that has ended fails what is left: these requests have not failed, another router can go on with them.
        ending = self._router.closed
        message = front_channel.outputs_message(outputs) if ending is None else ["ending", ending]
        self._post(front_channel.encode(message))

    def _post(self, data: bytes | None) -> None:
        try:
            self._outbox.put_nowait(data)
        except queue.Full:
            logger.error("%s: front %s does not read; dropping it", self._router.router_id, self._peer)
            # Not `close`: it would take the router's own locks again. The reader sees the end and closes.
            shut_down(self._sock)

    def _read(self) -> None:
        waiter = SocketWaiter(self._sock)
        try:
            while not self.closed:
                if waiter.readable(Deadline.after(_IDLE_POLL_S)):
                    self._handle(self._message(waiter))
        except PeerDiedError:
            logger.info("%s: front %s is gone", self._router.router_id, self._peer)
        except (LinkError, ValueError, TypeError, LookupError) as error:
            logger.error("%s: front %s: %s", self._router.router_id, self._peer, error)
        finally:
            self.close()

    def _message(self, waiter: SocketWaiter) -> list[object]:
        deadline = Deadline.after(_SEND_TIMEOUT_S)
        head = recv_exactly(self._sock, waiter, front_channel.LENGTH.size, deadline=deadline, peer=self._peer)
        (length,) = front_channel.LENGTH.unpack(head)
        if length > front_channel.MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes exceeds {front_channel.MAX_MESSAGE_BYTES}")
        return front_channel.decode(recv_exactly(self._sock, waiter, length, deadline=deadline, peer=self._peer))

    def _handle(self, message: list[object]) -> None:
        kind = message[0]
        if kind == "generate":
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
            while (data := self._outbox.get()) is not None:
                send_all(self._sock, waiter, data, deadline=Deadline.after(_SEND_TIMEOUT_S), peer=self._peer)
        except PeerTimeoutError as error:
            logger.error("%s: front %s is stuck: %s", self._router.router_id, self._peer, error)
        except PeerDiedError:
            pass  # the reader sees it too, and says so
        finally:
            self.close()
            self._sock.close()
