"""One request's outputs between the callback that brings them and the task that takes them."""

from __future__ import annotations

import asyncio
from collections import deque

from ..configs.errors import MorayError
from .messages import TokenOutput, joined


class TokenInbox:
    """Outputs of one request; for one event loop and one task that takes them.

    A task that is held up, by a client that reads slowly or by others that have the loop, takes all that has come meanwhile
    at once: what it then does costs the same as for one token.
    """

    def __init__(self) -> None:
        self._waiting: deque[TokenOutput | MorayError] = deque()
        self._taker: asyncio.Future[None] | None = None

    def put(self, item: TokenOutput | MorayError) -> None:
        """Bring an output, or the error that is raised once those before it were taken."""
        self._waiting.append(item)
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)

    async def take(self) -> TokenOutput:
        """All outputs that have come, as one; waits for the first.

        Raises:
            MorayError: it was put here.
        """
        waiting = self._waiting
        if not waiting:
            self._taker = asyncio.get_running_loop().create_future()
            try:
                await self._taker
            finally:
                self._taker = None
        item = waiting.popleft()
        if isinstance(item, MorayError):
            raise item
        if not waiting:
            return item
        items = [item]
        while waiting and isinstance(waiting[0], TokenOutput):
            items.append(waiting.popleft())  # type: ignore[arg-type]  # just looked at
        return joined(items)
