"""A deadline that moves with every token, and costs nothing where it is kept."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Patience:
    """How long whatever is waited for inside `async with` may take, said anew as often as one likes.

    `asyncio.timeout` sets and cancels a timer each time; a stream waits twice a token. Here one timer sleeps until the
    deadline as it was, and looks only then where it is by now.

    Attributes:
        expired: the deadline has passed, and what was waited for is cancelled.
    """

    def __init__(self) -> None:
        self.expired = False
        self._loop = asyncio.get_running_loop()
        self._until = math.inf
        self._or_else: Callable[[], Exception] = TimeoutError
        self._timer: asyncio.TimerHandle | None = None
        self._timeout = asyncio.timeout(None)

    def give(self, seconds: float, or_else: Callable[[], Exception]) -> None:
        """What is waited for from now on may take `seconds`, or leaving raises what `or_else` makes."""
        self._until = self._loop.time() + seconds
        self._or_else = or_else
        if self._timer is None or self._until < self._timer.when():
            self._sleep()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._or_else() from None

    def _sleep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._until, self._look)

    def _look(self) -> None:
        if self._until > self._loop.time():
            self._sleep()
        elif not self.expired:
            self.expired = True
            self._timeout.reschedule(self._loop.time())
