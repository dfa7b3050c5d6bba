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
from .links.handshake import authenticate_async
from .messages import GenerateRequest, RouterStats, TokenOutput

logger = logging.getLogger("moray.front")

_CONNECT_TIMEOUT_S = 10.0
_STATS_TIMEOUT_S = 2.0

_SUBMIT_TIMEOUT_S = 20.0
"""How long a router may take to say whether it takes a request. A thread of its own says so, however long steps take: a
router that is silent for so long is frozen."""


class RouterConnection:
    """A connection to one router; make one with `open`. All methods run on one event loop."""

    def __init__(self, router_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.router_id = router_id
        self._reader = reader
        self._writer = writer
        self._streams: dict[str, RouterStream] = {}
        self._stats: dict[int, asyncio.Future[RouterStats]] = {}
        self._numbers = itertools.count()
        self.loss: RouterLoss | None = None
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, router_id: str, address: str, *, secret: bytes, identity: str) -> RouterConnection:
        """Connect and authenticate.

        Raises:
            LinkError: the router is not there, or not ours.
        """
        host, _, port = address.rpartition(":")
        deadline = Deadline.after(_CONNECT_TIMEOUT_S)
        try:
            sock = await asyncio.to_thread(socket.create_connection, (host, int(port)), _CONNECT_TIMEOUT_S)
        except OSError as error:
            raise PeerDiedError(router_id, f"cannot connect to {address} ({error})") from error
        try:
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
            sock.close()
            raise
        return cls(router_id, reader, writer)

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
            raise ClusterError(f"{self.router_id} does not answer within {_STATS_TIMEOUT_S} s: {error!r}") from error
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
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
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
        try:
            while self.loss is None:
                (length,) = front_channel.LENGTH.unpack(await self._reader.readexactly(front_channel.LENGTH.size))
                if length > front_channel.MAX_MESSAGE_BYTES:
                    raise ValueError(f"a message of {length} bytes exceeds {front_channel.MAX_MESSAGE_BYTES}")
                self._take(front_channel.decode(await self._reader.readexactly(length)))
        except (OSError, EOFError) as error:
            self.lose(f"connection lost ({error})")
        except (ValueError, TypeError, LookupError) as error:
            self.lose(f"bad message ({error!r})")

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
        elif kind == "stats":
            answer = self._stats.get(message[1])
            if answer is not None and not answer.done():
                answer.set_result(RouterStats(**message[2]))
        else:
            raise ValueError(f"unknown message {kind!r}")


class RouterStream(AsyncIterator[TokenOutput]):
    """What one router answers to one request, until the output with a `finish_reason`. Always to be closed.

    Iterating raises `RouterLostError` where the router was lost; every output that arrived before comes first.

    Attributes:
        accepted: done once the router has taken the request, with its error if it did not.
    """

    def __init__(self, connection: RouterConnection, request_id: str) -> None:
        self.request_id = request_id
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._inbox: asyncio.Queue[TokenOutput | MorayError] = asyncio.Queue()
        self._ended = False

    async def __anext__(self) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        item = await self._inbox.get()
        if isinstance(item, MorayError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    def take(self, output: TokenOutput | None) -> None:
        """The router sent an output; None is the word that it took the request."""
        if not self.accepted.done():
            self.accepted.set_result(None)
        if output is not None:
            self._inbox.put_nowait(output)

    def fail(self, error: MorayError) -> None:
        """The router will send nothing more."""
        if self.accepted.done():
            self._inbox.put_nowait(error)
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
