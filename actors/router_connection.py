"""The front's side of the front channel: one connection to a router, and the answers that come over it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from ..configs.errors import ClusterError, MorayError, PeerDiedError, RouterLostError
from . import front_channel
from .deadline import Deadline
from .heartbeat import Heartbeat, Silence
from .links.handshake import authenticate_async
from .links.sockets import shut_down, split_endpoint
from .messages import GenerateRequest, RouterStats, TokenOutput
from .token_inbox import TokenInbox

logger = logging.getLogger("moray.front")

_OPEN_TIMEOUT_S = 3.0
"""For connecting and the handshake, which take milliseconds: as long as routers give a front for it. A frozen router's kernel
still takes connections, so that only the handshake's deadline tells."""

_STATS_TIMEOUT_S = 1.5
"""A thread of its own answers. Below the deadline of /health, so that it can still say which router does not."""

_SUBMIT_TIMEOUT_S = 20.0
"""How long a router may take to say whether it takes a request. A thread of its own says so, however long steps take: a
router that says that it lives, but not this, for so long has come to a halt inside."""

_READ_BYTES = 256 << 10


class RouterConnection:
    """A connection to one router; make one with `open`. All methods run on one event loop.

    Attributes:
        leaving: the router is about to end, or has another address now: it is sent nothing new.
    """

    def __init__(
        self,
        router_id: str,
        address: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        heartbeat: Heartbeat,
    ) -> None:
        self.router_id = router_id
        self.address = address
        self.leaving = False
        self.loss: RouterLoss | None = None
        self._reader = reader
        self._writer = writer
        self._silence = Silence(heartbeat)
        self._streams: dict[str, RouterStream] = {}
        self._stats: dict[int, asyncio.Future[RouterStats]] = {}
        self._numbers = itertools.count()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]

    @classmethod
    async def open(
        cls,
        router_id: str,
        address: str,
        *,
        secret: bytes,
        identity: str,
        heartbeat: Heartbeat = front_channel.OF_ROUTERS,
        timeout_s: float = _OPEN_TIMEOUT_S,
    ) -> RouterConnection:
        """Connect and authenticate.

        Args:
            identity: this front's.
            heartbeat: how often the router is told that this front lives, and how long it may be silent.

        Raises:
            LinkError: the router is not there, does not answer within `timeout_s`, or is not ours.
        """
        host, port = split_endpoint(address)
        deadline = Deadline.after(timeout_s)
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.get_running_loop().sock_connect(sock, (host, port))
            except OSError as error:  # a TimeoutError is one
                raise PeerDiedError(router_id, f"cannot connect to {address} ({error!r})") from error
            await authenticate_async(
                sock,
                secret=secret,
                identity=identity,
                channel=front_channel.CHANNEL,
                initiator=True,
                deadline=deadline,
                remote=router_id,
            )
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            shut_down(sock)  # wakes the handshake's thread where this was cancelled
            sock.close()
            raise
        return cls(router_id, address, reader, writer, heartbeat)

    @property
    def lost(self) -> str | None:
        """Why the router cannot be used any more; None while it can."""
        return None if self.loss is None else self.loss.reason

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def submit(self, request: GenerateRequest) -> RouterStream:
        """Hand over a request; returns once the router has taken it.

        Raises:
            QueueFullError, ContextTooLongError, RequestError: it was refused.
            RouterLostError: the router is lost, or was lost before it said anything.
        """
        if self.loss is not None:
            raise RouterLostError(f"{self.router_id} is lost: {self.loss.reason}")
        stream = self._streams[request.request_id] = RouterStream(self, request.request_id)
        try:
            async with asyncio.timeout(_SUBMIT_TIMEOUT_S):
                await self._send(front_channel.generate_message(request))
                await stream.accepted
        except OSError as error:  # a TimeoutError is one
            self.lose(f"did not take a request within {_SUBMIT_TIMEOUT_S:g} s ({error!r})")
            stream.close()
            raise RouterLostError(f"{self.router_id} is lost: {self.lost}") from error
        except BaseException as error:
            stream.close()
            if isinstance(error, RouterLostError):
                self.lose(str(error))  # refused: it is ending, and takes no other request either
            raise
        return stream

    async def stats(self) -> RouterStats:
        """The router's counters now.

        Raises:
            ClusterError: the router is lost or silent.
        """
        if self.loss is not None:
            raise ClusterError(f"{self.router_id} is lost: {self.loss.reason}")
        number = next(self._numbers)
        answer: asyncio.Future[RouterStats] = asyncio.get_running_loop().create_future()
        self._stats[number] = answer
        try:
            async with asyncio.timeout(_STATS_TIMEOUT_S):
                await self._send(["stats", number])
                return await answer
        except OSError as error:
            raise ClusterError(f"{self.router_id} does not answer within {_STATS_TIMEOUT_S:g} s ({error!r})") from error
        finally:
            self._stats.pop(number, None)

    def lose(self, reason: str) -> None:
        """Give the router up: close the connection, and let every request that is in flight there hear of it.

        Idempotent. The router cancels what it still has of these requests, should it live after all.
        """
        if self.loss is not None:
            return
        self.loss = RouterLoss(self.router_id, reason, {i for i, s in self._streams.items() if s.accepted.done()})
        self._writer.transport.abort()
        for stream in self._streams.values():
            stream.fail(RouterLostError(f"{self.router_id} was lost while it answered: {reason}"))
        for answer in self._stats.values():
            if not answer.done():
                answer.set_exception(ClusterError(f"{self.router_id} was lost: {reason}"))

    async def aclose(self) -> None:
        """Close the connection; the router cancels what is left."""
        if self.loss is None:
            self.loss = RouterLoss(self.router_id, "closed", None)
            for stream in self._streams.values():
                stream.fail(RouterLostError(f"the connection to {self.router_id} was closed while it answered"))
        self._writer.transport.abort()  # not `close`, which waits until a router that may be frozen has taken everything
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled():
                task.result()  # what went wrong in there must not go unseen
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def forget(self, request_id: str, *, cancel: bool) -> None:
        """A stream was closed: its later outputs are dropped, and the router is told if it should `cancel`."""
        self._streams.pop(request_id, None)
        if cancel and self.loss is None:
            # Not waited for: whoever gives a request up must not hang on a router that does not read.
            self._writer.write(front_channel.encode(["cancel", request_id]))

    async def _send(self, message: list[Any]) -> None:
        self._writer.write(front_channel.encode(message))
        await self._writer.drain()

    async def _read(self) -> None:
        arriving = front_channel.MessageBuffer()
        try:
            while data := await self._reader.read(_READ_BYTES):
                self._silence.heard()
                for message in arriving.feed(data):
                    if self.loss is not None:
                        return
                    self._take(message)
            self.lose("connection lost (the router closed it)")
        except OSError as error:
            self.lose(f"connection lost ({error})")
        except (ValueError, TypeError, LookupError) as error:
            self.lose(f"bad message ({error!r})")

    async def _beat(self) -> None:
        while self.loss is None:
            # Where the loop was held up, what arrived meanwhile is read before this goes on: its callbacks come first.
            await asyncio.sleep(self._silence.next_look_s)
            if self._silence.too_long():
                self.lose(f"heard nothing for {self._silence.seconds:.1f} s")
            elif self.loss is None:
                self._writer.write(front_channel.ALIVE)

    def _take(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == "outputs":
            for output in front_channel.outputs_from(message):
                stream = self._streams.get(output.request_id)
                if stream is not None:  # else given up here while the output was on its way
                    stream.take(output)
        elif kind == "accepted":
            stream = self._streams.get(message[1])
            if stream is not None:
                stream.take(None)
        elif kind == "refused":
            stream = self._streams.get(message[1])
            if stream is not None:
                stream.fail(front_channel.refusal_from(message))
        elif kind == "ending":
            self.lose(str(message[1]))
        elif kind == "alive":
            pass  # that it arrived is all there is to it
        elif kind == "stats":
            answer = self._stats.get(message[1])
            if answer is not None and not answer.done():
                answer.set_result(RouterStats(**message[2]))
        else:
            raise ValueError(f"unknown message {kind!r}")


class RouterStream(AsyncIterator[TokenOutput]):
    """What one router answers to one request, until the output with a `finish_reason`. Always to be closed.

    Iterating raises `RouterLostError` where the router was lost; every output that arrived before comes first. Outputs that
    wait to be taken come as one.

    Attributes:
        accepted: done once the router has taken the request, with its error if it did not.
    """

    def __init__(self, connection: RouterConnection, request_id: str) -> None:
        self.request_id = request_id
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._inbox = TokenInbox()
        self._ended = False

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            output = await self._inbox.take()
        except MorayError:
            self._ended = True
            raise
        self._ended = output.finish_reason is not None
        return output

    def take(self, output: TokenOutput | None) -> None:
        """The router sent an output; None is the word that it took the request."""
        if not self.accepted.done():
            self.accepted.set_result(None)
        if output is not None:
            self._inbox.put(output)

    def fail(self, error: MorayError) -> None:
        """The router will send nothing more."""
        if self.accepted.done():
            self._inbox.put(error)
        else:
            self._ended = True
            self.accepted.set_exception(error)

    def moved(self) -> None:
        """The request goes on at another router, since this one was lost."""
        if self._connection.loss is not None:
            self._connection.loss.settle(self.request_id, resubmitted=True)

    def close(self) -> None:
        """Take nothing more; a request that has not ended is cancelled at the router. Idempotent."""
        self._connection.forget(self.request_id, cancel=not self._ended)
        self._ended = True
        if not self.accepted.cancel() and not self.accepted.cancelled():
            self.accepted.exception()  # asyncio complains of errors that nobody looked at
        if self._connection.loss is not None:
            self._connection.loss.settle(self.request_id, resubmitted=False)


class RouterLoss:
    """What became of the requests of a router that was lost; one line of the log once each has gone on or ended.

    Args:
        router_id: the router's.
        reason: how it was lost.
        in_flight: ids of the requests that it had then; None where it was not lost but left.
    """

    def __init__(self, router_id: str, reason: str, in_flight: set[str] | None) -> None:
        self.reason = reason
        self._router_id = router_id
        self._since = time.monotonic()
        self._unsettled = in_flight or set()
        self._in_flight = len(self._unsettled)
        self._resubmitted = 0
        if self._unsettled:
            logger.warning("%s: %s; %d requests were in flight", router_id, reason, self._in_flight)
        elif in_flight is not None:
            self._log()

    def settle(self, request_id: str, *, resubmitted: bool) -> None:
        """One of the requests is at another router, or has ended. Idempotent."""
        if request_id in self._unsettled:
            self._unsettled.remove(request_id)
            self._resubmitted += resubmitted
            if not self._unsettled:
                self._log()

    def _log(self) -> None:
        logger.warning(
            "event=router_lost router=%s in_flight=%d resubmitted=%d duration_s=%.3f reason=%r",
            self._router_id,
            self._in_flight,
            self._resubmitted,
            time.monotonic() - self._since,
            self.reason,
        )
