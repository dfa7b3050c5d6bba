"""The engine in the front's own process, for local mode: the router steps in its thread, outputs hop to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from .engine_client import EngineClient
from .messages import ClusterStatus, GenerateRequest, TokenOutput
from .router import Router


class LocalEngine(EngineClient):
    """Hands requests to a started router.

    Args:
        router: runs in its own thread already.
        describe: the state of the local cluster.
    """

    def __init__(self, router: Router, describe: Callable[[], ClusterStatus]) -> None:
        self._router = router
        self._describe = describe

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient.generate`."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[TokenOutput] = asyncio.Queue()

        def sink(outputs: list[TokenOutput]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                for output in outputs:
                    loop.call_soon_threadsafe(inbox.put_nowait, output)

        self._router.submit(request, sink)
        ended = False
        try:
            while not ended:
                output = await inbox.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            if not ended:
                self._router.cancel(request.request_id)

    async def status(self) -> ClusterStatus:
        """See `EngineClient.status`."""
        return self._describe()
