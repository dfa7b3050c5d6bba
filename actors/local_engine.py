"""The engine in the front's own process, for local mode: the router steps in its thread, outputs hop to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from .engine_client import EngineClient
from .messages import ClusterStatus, GenerateRequest, TokenOutput
from .router import Router
from .router_inbox import Sink
from .token_inbox import TokenInbox


class LocalEngine(EngineClient):
    """Hands requests to a started router.

    Args:
        router: runs in its own thread already.
        describe: the state of the local cluster.
    """

    def __init__(self, router: Router, describe: Callable[[], ClusterStatus]) -> None:
        self._router = router
        self._describe = describe
        self._inboxes: dict[str, TokenInbox] = {}
        self._sinks: dict[asyncio.AbstractEventLoop, Sink] = {}

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient.generate`."""
        inbox = TokenInbox()
        self._router.submit(request, self._sink(asyncio.get_running_loop()))
        self._inboxes[request.request_id] = inbox  # in time: what comes for it comes in a later turn of this loop
        ended = False
        try:
            while not ended:
                output = await inbox.take()
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._inboxes[request.request_id]
            if not ended:
                self._router.cancel(request.request_id)

    def _sink(self, loop: asyncio.AbstractEventLoop) -> Sink:
        """One for all requests of a loop, which the router's thread then wakes once a step."""

        def sink(outputs: list[TokenOutput]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._deliver, outputs)

        return self._sinks.setdefault(loop, sink)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:  # else given up while the output was on its way
                inbox.put(output)

    async def status(self) -> ClusterStatus:
        """See `EngineClient.status`."""
        return self._describe()
