"""The front's side of the front channel: one connection to each router, and the engine as the front sees it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from ..configs.errors import ClusterError, ExpertsUnavailableError, MorayError, PeerDiedError
from . import front_channel
from .deadline import Deadline
from .engine_client import EngineClient
from .links.handshake import authenticate_async
from .messages import ClusterStatus, GenerateRequest, Health, RouterStats, TokenOutput

logger = logging.getLogger("moray.front")

_CONNECT_TIMEOUT_S = 10.0
_STATS_TIMEOUT_S = 2.0
_RECONNECT_PAUSE_S = 0.5


class RouterConnection:
    """A connection to one router; make one with `open`. All methods run on one event loop."""

    def __init__(self, router_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.router_id = router_id
        self._reader = reader
        self._writer = writer
        self._outputs: dict[str, asyncio.Queue[TokenOutput | MorayError]] = {}
        self._stats: dict[int, asyncio.Future[RouterStats]] = {}
        self._numbers = itertools.count()
        self.lost: str | None = None
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
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._outputs)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient.generate`."""
        if self.lost is not None:
            raise ExpertsUnavailableError(f"{self.router_id} is lost: {self.lost}")
        inbox: asyncio.Queue[TokenOutput | MorayError] = asyncio.Queue()
        self._outputs[request.request_id] = inbox
        ended = False
        try:
            try:
                await self._send(front_channel.generate_message(request))
            except OSError as error:
                raise ExpertsUnavailableError(f"{self.router_id} is lost: {error}") from error
            while not ended:
                output = await inbox.get()
                if isinstance(output, MorayError):
                    ended = True
                    raise output
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._outputs[request.request_id]
            if not ended and self.lost is None:
                with contextlib.suppress(OSError):  # a router that is gone holds no pages
                    await self._send(["cancel", request.request_id])

    async def stats(self) -> RouterStats:
        """The router's counters now.

        Raises:
            ClusterError: the router is lost or silent.
        """
        if self.lost is not None:
            raise ClusterError(f"{self.router_id} is lost: {self.lost}")
        number = next(self._numbers)
        answer = self._stats[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(["stats", number])
            return await asyncio.wait_for(answer, _STATS_TIMEOUT_S)
        except (TimeoutError, OSError) as error:
            raise ClusterError(f"{self.router_id} does not answer within {_STATS_TIMEOUT_S} s: {error!r}") from error
        finally:
            self._stats.pop(number, None)

    async def aclose(self) -> None:
        """Close the connection; the router cancels what is left."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _send(self, message: list[Any]) -> None:
        self._writer.write(front_channel.encode(message))
        await self._writer.drain()

    async def _read(self) -> None:
        reason = "closed"
        try:
            while True:
                (length,) = front_channel.LENGTH.unpack(await self._reader.readexactly(front_channel.LENGTH.size))
                if length > front_channel.MAX_MESSAGE_BYTES:
                    raise ValueError(f"a message of {length} bytes exceeds {front_channel.MAX_MESSAGE_BYTES}")
                self._take(front_channel.decode(await self._reader.readexactly(length)))
        except (OSError, EOFError) as error:
            reason = f"connection lost ({error})"
        except (ValueError, TypeError, LookupError) as error:
            reason = f"bad message ({error!r})"
        finally:
            self.lost = reason
            logger.warning("%s: %s", self.router_id, reason)
            for inbox in self._outputs.values():
                inbox.put_nowait(ExpertsUnavailableError(f"{self.router_id} was lost while it answered: {reason}"))
            for answer in self._stats.values():
                if not answer.done():
                    answer.set_exception(ClusterError(f"{self.router_id} was lost: {reason}"))

    def _take(self, message: list[Any]) -> None:
        if message[0] == "outputs":
            for output in front_channel.outputs_from(message):
                inbox = self._outputs.get(output.request_id)
                if inbox is not None:  # else cancelled here while the output was on its way
                    inbox.put_nowait(output)
        elif message[0] == "refused":
            inbox = self._outputs.get(message[1])
            if inbox is not None:
                inbox.put_nowait(front_channel.refusal_from(message))
        elif message[0] == "stats":
            answer = self._stats.get(message[1])
            if answer is not None and not answer.done():
                answer.set_result(RouterStats(**message[2]))
        else:
            raise ValueError(f"unknown message {message[0]!r}")


class ClusterClient(EngineClient):
    """The engine behind a front of a cluster: spreads requests over routers, the one with the fewest in flight first.

    Args:
        directory: asks the controller where the routers are: router id -> address.
        describe: asks the controller for the cluster's state; the routers' own counters are asked of them directly.
        secret: the cluster's; `directory` may set it anew, for a controller that was replaced brings a new one.
        front_id: this front's identity.
    """

    def __init__(
        self,
        directory: Callable[[], Awaitable[Mapping[str, str]]],
        describe: Callable[[], Awaitable[ClusterStatus]],
        *,
        secret: bytes,
        front_id: str,
    ) -> None:
        self._directory = directory
        self._describe = describe
        self.secret = secret
        self._front_id = front_id
        self._connections: dict[str, RouterConnection] = {}
        self._reconnecting: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect to every router, and stay connected: a router that was lost and restored is found again.

        Raises:
            LinkError: one is not there.
        """
        await self._connect()
        self._reconnecting = asyncio.create_task(self._reconnect())

    async def _connect(self) -> None:
        failures: list[MorayError] = []
        for router_id, address in (await self._directory()).items():
            connection = self._connections.get(router_id)
            if connection is None or connection.lost is not None:
                try:
                    self._connections[router_id] = await RouterConnection.open(
                        router_id, address, secret=self.secret, identity=self._front_id
                    )
                except MorayError as error:
                    failures.append(error)  # the others may well be there
                    continue
                if connection is not None:
                    await connection.aclose()
        if failures:
            raise failures[0]

    async def _reconnect(self) -> None:
        while True:
            await asyncio.sleep(_RECONNECT_PAUSE_S)
            if any(connection.lost is not None for connection in self._connections.values()):
                try:
                    await asyncio.wait_for(self._connect(), _CONNECT_TIMEOUT_S)
                except (MorayError, TimeoutError) as error:
                    logger.info("%s: not reconnected yet: %s", self._front_id, error)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient.generate`."""
        alive = [c for c in self._connections.values() if c.lost is None]
        if not alive:
            lost = "; ".join(f"{c.router_id}: {c.lost}" for c in self._connections.values())
            raise ExpertsUnavailableError(f"no router can be reached: {lost or 'none connected'}")
        connection = min(alive, key=lambda c: c.outstanding)
        # Several fronts share a router: ids are made unique across them here.
        wire_id = f"{self._front_id}/{uuid.uuid4().hex}"
        outputs = connection.generate(replace(request, request_id=wire_id))
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield replace(output, request_id=request.request_id)

    async def status(self) -> ClusterStatus:
        """See `EngineClient.status`."""
        asked = asyncio.gather(*(c.stats() for c in self._connections.values()), return_exceptions=True)
        problems: list[str] = []
        try:
            status = await self._describe()
        except MorayError as error:
            problems.append(f"the controller does not answer: {error}")
            status = ClusterStatus("", 0, "unavailable", "", [], [])
        answers = await asked
        routers = [answer for answer in answers if isinstance(answer, RouterStats)]
        problems += [str(answer) for answer in answers if isinstance(answer, BaseException)]
        if status.reason:
            problems.append(status.reason)
        for router in routers:
            if router.unreachable_experts:
                problems.append(
                    f"{router.router_id}: {router.unreachable_experts} (layer, expert) pairs unreachable: "
                    + "; ".join(router.broken_links)
                )
        serving = bool(routers) and not any(r.unreachable_experts for r in routers) and status.health != "unavailable"
        health: Health = "unavailable" if not serving else "degraded" if problems else "ok"
        return replace(status, routers=routers, health=health, reason="; ".join(problems))

    async def aclose(self) -> None:
        """See `EngineClient.aclose`."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reconnecting
        for connection in self._connections.values():
            await connection.aclose()
