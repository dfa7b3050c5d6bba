"""The engine as a front of a cluster sees it: requests go to routers, and outlive them.

A request whose router is lost goes on at another one: what it has answered so far is handed over with the prompt, and since
a token is a function of the tokens before it, the seed and its position alone, the answer comes out as if nothing had
happened. Nothing is lost, for what the front has not received is computed again; nothing comes twice, for each attempt has
an id of its own and what is still said of an earlier one finds nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace

from ..configs.errors import MorayError, QueueFullError, RouterLostError
from .deadline import Deadline
from .engine_client import EngineClient
from .messages import ClusterStatus, GenerateRequest, Health, RouterStats, TokenOutput
from .router_connection import RouterConnection, RouterStream

logger = logging.getLogger("moray.front")

_CONNECT_TIMEOUT_S = 10.0
_RECONNECT_PAUSE_S = 0.5

_MAX_DEATHS = 5
"""A request under which more routers die than this is given up: it may be what kills them."""

_FULL_PAUSES_S = (0.05, 1.0)
"""First and longest pause between looks for room where every queue is full; each is twice the one before."""

_FULL_TIMEOUT_S = 600.0
"""How long a request of a lost router looks for room: as long as the HTTP side waits for a token (`FrontSettings`)."""


class ClusterClient(EngineClient):
    """The engine behind a front of a cluster: spreads requests over routers, the one with the fewest in flight first.

    Args:
        directory: asks the controller where the routers are: router id -> address.
        describe: asks the controller for the cluster's state; the routers' own counters are asked of them directly.
        secret: the cluster's; `directory` may set it anew, for a controller that was replaced brings a new one.
        front_id: this front's identity.
        restore_timeout_s: a request whose router was lost fails if no router can be reached for so long.
    """

    def __init__(
        self,
        directory: Callable[[], Awaitable[Mapping[str, str]]],
        describe: Callable[[], Awaitable[ClusterStatus]],
        *,
        secret: bytes,
        front_id: str,
        restore_timeout_s: float,
    ) -> None:
        self._directory = directory
        self._describe = describe
        self.secret = secret
        self._front_id = front_id
        self._restore_timeout_s = restore_timeout_s
        self._connections: dict[str, RouterConnection] = {}
        self._complete = False
        self._reconnecting: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()  # replaced each time: set once a router was connected, or none will be
        self._closed = False
        self._resubmitted = 0
        self._homeless = 0  # requests that wait for a router
        self._crowded_out = 0  # and for room in a queue

    @property
    def resubmitted(self) -> int:
        """See `EngineClient.resubmitted`."""
        return self._resubmitted

    async def connect(self) -> None:
        """Connect to the routers, and stay connected: one that was lost and restored is found again.

        Raises:
            LinkError: none of them is there.
        """
        failures = await self._connect()
        if failures and not self._alive():
            raise failures[0]
        self._reconnecting = asyncio.create_task(self._reconnect())

    async def _connect(self) -> list[MorayError]:
        """Connect to every router that is not connected; why some could not be."""
        self._complete = False
        addresses = await self._directory()
        wanted = [router_id for router_id in addresses if not self._is_connected(router_id)]
        # Side by side: one whose machine does not answer must not keep the front from the others.
        opened = await asyncio.gather(*(self._open(name, addresses[name]) for name in wanted), return_exceptions=True)
        for router_id in [name for name in self._connections if name not in addresses and not self._is_connected(name)]:
            await self._connections.pop(router_id).aclose()
        for error in opened:
            if isinstance(error, BaseException) and not isinstance(error, MorayError):
                raise error
        failures = [error for error in opened if isinstance(error, MorayError)]
        self._complete = not failures
        return failures

    async def _open(self, router_id: str, address: str) -> None:
        connection = await RouterConnection.open(router_id, address, secret=self.secret, identity=self._front_id)
        if self._is_connected(router_id):  # meanwhile, and it may have requests already
            await connection.aclose()
            return
        before = self._connections.get(router_id)
        self._connections[router_id] = connection
        self._wake()
        if before is not None:
            await before.aclose()

    async def _reconnect(self) -> None:
        while True:
            await asyncio.sleep(_RECONNECT_PAUSE_S)
            if self._complete and all(map(self._is_connected, self._connections)):
                continue
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    for failure in await self._connect():
                        logger.info("%s: not reconnected yet: %s", self._front_id, failure)
            except (MorayError, TimeoutError) as error:
                logger.info("%s: not reconnected yet: %r", self._front_id, error)
            except Exception:
                # Whatever it is must not end this loop: without it the front never finds a restored router.
                logger.exception("%s: reconnecting failed", self._front_id)

    def _is_connected(self, router_id: str) -> bool:
        connection = self._connections.get(router_id)
        return connection is not None and connection.lost is None

    def _alive(self) -> list[RouterConnection]:
        """Routers that can be asked, the one with the fewest requests in flight first."""
        alive = [c for c in self._connections.values() if c.lost is None]
        return sorted(alive, key=lambda c: (c.outstanding, c.router_id))

    def _wake(self) -> None:
        self._connected.set()
        self._connected = asyncio.Event()

    # ---- one request --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient.generate`."""
        # Several fronts share a router, and each attempt at a request is one of its own.
        name = f"{self._front_id}/{uuid.uuid4().hex}"
        attempts = (f"{name}/{number}" for number in itertools.count())
        so_far = [*request.generated_token_ids]
        deaths = 0
        stream = await self._place(request, attempts, admitted=False)
        try:
            while True:
                try:
                    async for output in stream:
                        so_far += output.token_ids
                        yield replace(output, request_id=request.request_id)
                    return
                except RouterLostError as error:
                    deaths += 1
                    if deaths > _MAX_DEATHS:
                        raise RouterLostError(
                            f"{deaths} routers were lost while they answered this request; it is given up ({error})"
                        ) from error
                rest = replace(request, generated_token_ids=[*so_far])
                moved = await self._place(rest, attempts, admitted=True)
                self._resubmitted += 1
                stream.moved()
                stream.close()
                stream = moved
        finally:
            stream.close()

    async def _place(self, request: GenerateRequest, attempts: Iterator[str], *, admitted: bool) -> RouterStream:
        """Hand a request to the first router that takes it.

        One that was `admitted` before is not turned away: it waits for a router, or for room in a queue.

        Raises:
            QueueFullError, ContextTooLongError, RequestError: it was refused.
            RouterLostError: no router could be reached, for too long if it was admitted.
        """
        restored = Deadline.after(self._restore_timeout_s)
        room = Deadline.after(_FULL_TIMEOUT_S)
        pause, longest_pause = _FULL_PAUSES_S
        crowded_out = False
        try:
            while not self._closed:
                alive = self._alive()
                if alive and self._crowded_out and not admitted:
                    raise QueueFullError("requests of a lost router are waiting for room", retry_after_s=1.0)
                full: QueueFullError | None = None
                for connection in alive:
                    try:
                        return await connection.submit(replace(request, request_id=next(attempts)))
                    except QueueFullError as error:
                        full = error
                    except RouterLostError:
                        admitted = True  # it may have been taken; at any rate nothing was wrong when it came
                if full is None:
                    await self._await_router(restored, admitted=admitted)
                    continue
                if not admitted:
                    raise full
                if room.passed:
                    raise RouterLostError(f"the router was lost, and no other has room: {full}") from full
                if not crowded_out:
                    crowded_out = True
                    self._crowded_out += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest_pause)
                restored = Deadline.after(self._restore_timeout_s)  # a router that is full is there
            raise RouterLostError("the front is shutting down")
        finally:
            self._crowded_out -= crowded_out

    async def _await_router(self, deadline: Deadline, *, admitted: bool) -> None:
        """Wait until a router is connected, if none is."""
        if self._closed or self._alive():
            return
        lost = "; ".join(f"{c.router_id}: {c.lost}" for c in self._connections.values()) or "none connected"
        if not admitted:
            raise RouterLostError(f"no router can be reached: {lost}")
        self._homeless += 1
        try:
            async with asyncio.timeout(deadline.remaining()):
                await self._connected.wait()
        except TimeoutError as error:
            raise RouterLostError(
                f"the router was lost, and none was restored within {self._restore_timeout_s:g} s: {lost}"
            ) from error
        finally:
            self._homeless -= 1

    # ---- the cluster --------------------------------------------------------------------------------------------------

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
        if self._homeless:
            problems.append(f"{self._homeless} requests wait for a router to be restored")
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
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reconnecting
        for connection in self._connections.values():
            await connection.aclose()
        self._wake()
