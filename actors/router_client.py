"""The engine as a front of a cluster sees it: requests go to routers, and outlive them.

A request whose router is lost goes on at another one: what it has answered so far is handed over with the prompt, and since
a token is a function of the tokens before it, the seed and its position alone, the answer comes out as if nothing had
happened. Nothing is lost, for what the front has not received is computed again; nothing comes twice, for each attempt has
an id of its own and what is still said of an earlier one finds nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import replace

from ..configs.errors import MorayError, QueueFullError, RouterLostError
from . import front_channel
from .deadline import Deadline
from .engine_client import EngineClient
from .front.health import judged
from .heartbeat import Heartbeat
from .messages import ClusterStatus, GenerateRequest, TokenOutput
from .router_connection import RouterStream
from .router_pool import REFRESH_S, Directory, RouterPool

_DESCRIBE_TIMEOUT_S = 1.5
"""How long the controller is waited for; below the deadline of /health, which says so instead of giving up."""

_MAX_DEATHS = 5
"""A request under which more routers in a row die than this is given up: it may be what kills them."""

_PROVEN_TOKENS = 64
"""A router that has given a request so many tokens is not lost because of it: what kills one comes back soon at the next, which
begins where that one ended. Without this, long answers would not outlive a bad day."""

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
        refresh_s, heartbeat: see `RouterPool`.
    """

    def __init__(
        self,
        directory: Directory,
        describe: Callable[[], Awaitable[ClusterStatus]],
        *,
        secret: bytes,
        front_id: str,
        restore_timeout_s: float,
        refresh_s: float = REFRESH_S,
        heartbeat: Heartbeat = front_channel.OF_ROUTERS,
    ) -> None:
        self._describe = describe
        self._front_id = front_id
        self._restore_timeout_s = restore_timeout_s
        self._pool = RouterPool(directory, secret=secret, front_id=front_id, refresh_s=refresh_s, heartbeat=heartbeat)
        self._closed = False
        self._model = ""  # as the controller named it last
        self._resubmitted = 0
        self._homeless = 0  # requests that wait for a router
        self._crowded_out = 0  # and for room in a queue

    @property
    def secret(self) -> bytes:
        """The cluster's secret, for connections that are still to be made."""
        return self._pool.secret

    @secret.setter
    def secret(self, secret: bytes) -> None:
        self._pool.secret = secret

    @property
    def resubmitted(self) -> int:
        """See `EngineClient.resubmitted`."""
        return self._resubmitted

    async def connect(self) -> None:
        """Connect to the routers, and stay connected as they come, go and are restored.

        Raises:
            LinkError: none of them is there.
            ClusterError: the controller does not say where they are.
        """
        await self._pool.connect()

    # ---- one request --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient.generate`."""
        # Several fronts share a router, and each attempt at a request is one of its own.
        name = f"{self._front_id}/{uuid.uuid4().hex}"
        attempts = (f"{name}/{number}" for number in itertools.count())
        so_far = [*request.generated_token_ids]
        before = len(so_far)  # what the present router began with
        deaths = 0
        stream = await self._place(request, attempts, admitted=False)
        try:
            while True:
                try:
                    async for output in stream:
                        so_far += output.token_ids
                        end = output.finish_reason, output.error, output.retry_after_s, output.cached_tokens
                        yield TokenOutput(request.request_id, output.token_ids, output.logprobs, *end)
                    return
                except RouterLostError as error:
                    deaths = 1 if len(so_far) - before >= _PROVEN_TOKENS else deaths + 1
                    if deaths > _MAX_DEATHS:
                        raise RouterLostError(
                            f"{deaths} routers were lost while they answered this request; it is given up ({error})"
                        ) from error
                before = len(so_far)
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
                alive = self._pool.usable
                if alive and self._crowded_out and not admitted:
                    raise QueueFullError("requests of a lost router are waiting for room", retry_after_s=1.0)
                full: QueueFullError | None = None
                for connection in alive:
                    if connection.leaving:  # since it was listed
                        continue
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
        if self._closed or self._pool.usable:
            return
        absent = "; ".join(f"{name} {why}" for name, why in sorted(self._pool.absent.items())) or "none connected"
        if not admitted:
            raise RouterLostError(f"no router can be reached: {absent}")
        self._homeless += 1
        try:
            if not await self._pool.wait(deadline):
                raise RouterLostError(
                    f"the router was lost, and none was restored within {self._restore_timeout_s:g} s: {absent}"
                )
        finally:
            self._homeless -= 1

    # ---- the cluster --------------------------------------------------------------------------------------------------

    async def status(self) -> ClusterStatus:
        """See `EngineClient.status`. The routers' word that every expert is reachable is enough to serve: a controller
        that does not answer makes a cluster degraded, and is missed only once something else fails."""
        (status, problems), (routers, absent) = await asyncio.gather(self._described(), self._pool.stats())
        problems += absent
        if self._homeless:
            problems.append(f"{self._homeless} requests wait for a router to be restored")
        if not routers:
            problems.insert(0, "no router can be reached")
            status = replace(status, health="unavailable")
        return judged(replace(status, routers=routers), problems)

    async def _described(self) -> tuple[ClusterStatus, list[str]]:
        """What the controller says, and what is wrong with that."""
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                status = await self._describe()
        except TimeoutError:
            problem = f"the controller does not answer within {_DESCRIBE_TIMEOUT_S:g} s"
        except MorayError as error:
            problem = f"the controller does not answer: {error}"
        else:
            self._model = status.model
            if status.health == "starting":  # again: there are routers to be asked already
                return replace(status, health="degraded"), ["the controller is starting"]
            return status, []
        return ClusterStatus(self._model, 0, "ok", "", [], []), [problem]

    async def aclose(self) -> None:
        """See `EngineClient.aclose`."""
        self._closed = True
        await self._pool.aclose()
