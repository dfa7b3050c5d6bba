"""A front's connections to the routers of its cluster, kept as the controller's directory has them.

The directory is asked again and again: routers are added, restored at other addresses, and removed. One that is to leave gets
nothing new, and keeps its requests until they end or it goes. While nobody can be asked, what was known last holds on: the
routers serve without the controller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ..configs.errors import ClusterError, MorayError
from . import front_channel
from .deadline import Deadline
from .heartbeat import Heartbeat
from .messages import RouterStats
from .router_connection import RouterConnection

logger = logging.getLogger("moray.front")

REFRESH_S = 1.0
"""How often the directory is asked while all is well: one cheap call of each front."""

_RETRY_S = 0.5
"""How often while a router is not connected, and how often that is tried."""

_DIRECTORY_TIMEOUT_S = 3.0
"""The answer takes milliseconds where there is one."""

Directory = Callable[[], Awaitable[Mapping[str, str]]]
"""Asks the controller where the routers are: router id -> address."""


class RouterPool:
    """Connections to every router of the directory. All methods run on one event loop.

    Args:
        secret: the cluster's; may be set anew at any time.
        front_id: this front's identity.
        refresh_s: how often the directory is asked.
        heartbeat: see `RouterConnection.open`.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        secret: bytes,
        front_id: str,
        refresh_s: float = REFRESH_S,
        heartbeat: Heartbeat = front_channel.OF_ROUTERS,
    ) -> None:
        self.secret = secret
        self._directory = directory
        self._front_id = front_id
        self._refresh_s = refresh_s
        self._heartbeat = heartbeat
        self._addresses: dict[str, str] = {}
        self._connections: dict[str, RouterConnection] = {}  # of routers in the directory, also lost ones
        self._leaving: list[RouterConnection] = []
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, MorayError] = {}  # why a router could not be connected the last time
        self._unanswered = False
        self._following: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # replaced each time: set once a router was connected, or none will be

    # ---- who there is -------------------------------------------------------------------------------------------------

    @property
    def usable(self) -> list[RouterConnection]:
        """Routers that take requests, the one with the fewest in flight first."""
        alive = [c for c in self._connections.values() if c.loss is None]
        return sorted(alive, key=lambda c: (c.outstanding, c.router_id))

    @property
    def absent(self) -> dict[str, str]:
        """Routers of the directory that cannot be used, and why."""
        reasons = {name: f"cannot be reached: {error}" for name, error in self._failures.items()}
        lost = {name: f"is lost: {c.lost}" for name, c in self._connections.items() if c.lost is not None}
        return reasons | lost

    async def wait(self, deadline: Deadline) -> bool:
        """Wait until a router is connected, or the pool is closed; False if that did not happen before the deadline."""
        try:
            async with asyncio.timeout(deadline.remaining()):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def stats(self) -> tuple[list[RouterStats], list[str]]:
        """The counters of every router that answers, and what is wrong with the others of the directory."""
        absent = [f"{name} {why}" for name, why in sorted(self.absent.items())]
        asked = [*self.usable, *(c for c in self._leaving if c.loss is None)]
        answers = await asyncio.gather(*(c.stats() for c in asked), return_exceptions=True)
        problems = []
        for connection, answer in zip(asked, answers, strict=True):
            if isinstance(answer, ClusterError):
                if not connection.leaving:
                    problems.append(str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, RouterStats)], absent + problems

    # ---- following the directory --------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect to the routers, and follow the directory from now on.

        Raises:
            LinkError: none of them is there.
            ClusterError: the directory cannot be asked.
        """
        try:
            async with asyncio.timeout(_DIRECTORY_TIMEOUT_S):
                self._addresses = dict(await self._directory())
        except TimeoutError as error:
            raise ClusterError(f"the directory did not answer within {_DIRECTORY_TIMEOUT_S:g} s") from error
        await self._reconcile()
        if self._opening:
            await asyncio.wait(self._opening.values())
        if self._failures and not self.usable:
            raise next(iter(self._failures.values()))
        self._following = asyncio.create_task(self._follow())

    async def aclose(self) -> None:
        """Close every connection; the routers cancel what is left."""
        tasks = [*self._opening.values(), *([self._following] if self._following is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in [*self._connections.values(), *self._leaving]:
            await connection.aclose()
        self._wake()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(min(_RETRY_S, self._refresh_s) if self._incomplete else self._refresh_s)
            try:
                await self._ask()
                await self._reconcile()
            except Exception:
                # Whatever it is must not end this loop: without it the front never finds a restored router.
                logger.exception("%s: following the directory failed", self._front_id)

    @property
    def _incomplete(self) -> bool:
        return any(not self._is_connected(name) for name in self._addresses)

    async def _ask(self) -> None:
        """Ask the directory; without an answer the last one holds on."""
        try:
            async with asyncio.timeout(_DIRECTORY_TIMEOUT_S):
                addresses = dict(await self._directory())
            if not addresses:
                # A cluster has a router at least: whoever says otherwise does not know it (yet).
                raise ClusterError("the directory is empty")
        except (MorayError, TimeoutError) as error:
            if not self._unanswered:
                self._unanswered = True
                logger.warning(
                    "event=directory_unanswered front=%s reason=%r: the routers that are known go on being used",
                    self._front_id,
                    str(error) or f"no answer within {_DIRECTORY_TIMEOUT_S:g} s",
                )
            return
        if self._unanswered:
            self._unanswered = False
            logger.warning("event=directory_answered front=%s routers=%s", self._front_id, ",".join(sorted(addresses)))
        self._addresses = addresses

    async def _reconcile(self) -> None:
        """Let go of routers that have left, and begin to connect to those that are not connected."""
        for name, connection in list(self._connections.items()):
            if self._addresses.get(name) != connection.address:
                del self._connections[name]
                self._leave(connection)
                if connection.loss is not None:
                    self._failures[name] = ClusterError(f"{connection.lost}; it is to be found elsewhere now")
        for name in self._failures.keys() - self._addresses.keys():
            del self._failures[name]
        for connection in [c for c in self._leaving if c.loss is not None or not c.outstanding]:
            await connection.aclose()
            self._leaving.remove(connection)
        for name, address in self._addresses.items():
            if not self._is_connected(name) and not self._come_back(name, address) and name not in self._opening:
                # Each by itself: one that is frozen must not keep the front from the others.
                self._opening[name] = asyncio.create_task(self._open(name, address))

    def _leave(self, connection: RouterConnection) -> None:
        connection.leaving = True
        self._leaving.append(connection)
        if connection.loss is None:
            logger.info(
                "event=router_leaving front=%s router=%s in_flight=%d",
                self._front_id,
                connection.router_id,
                connection.outstanding,
            )

    def _come_back(self, name: str, address: str) -> bool:
        """Whether a router that was to leave is there all the same."""
        for connection in self._leaving:
            if (connection.router_id, connection.address) == (name, address) and connection.loss is None:
                self._leaving.remove(connection)
                connection.leaving = False
                self._connections[name] = connection
                self._failures.pop(name, None)
                self._wake()
                return True
        return False

    async def _open(self, name: str, address: str) -> None:
        try:
            connection = await RouterConnection.open(
                name, address, secret=self.secret, identity=self._front_id, heartbeat=self._heartbeat
            )
        except MorayError as error:
            if str(self._failures.get(name)) != str(error):
                logger.info("%s: %s is not connected yet: %s", self._front_id, name, error)
            self._failures[name] = error
            return
        except Exception as error:
            logger.exception("%s: connecting to %s failed", self._front_id, name)
            self._failures[name] = ClusterError(repr(error))
            return
        finally:
            del self._opening[name]
        if self._addresses.get(name) != address:  # it left or moved meanwhile
            await connection.aclose()
            return
        before = self._connections.get(name)
        self._connections[name] = connection
        self._failures.pop(name, None)
        self._wake()
        if before is not None:
            await before.aclose()

    def _is_connected(self, name: str) -> bool:
        connection = self._connections.get(name)
        return connection is not None and connection.loss is None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
