"""The front's HTTP server within an event loop that runs already."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

_START_TIMEOUT_S = 10.0
"""It takes milliseconds: the socket is there, and the application has nothing to prepare."""

_KEEP_ALIVE_S = 90
"""How long a connection may be idle between two requests, as behind Ray Serve: with uvicorn's own 5 s a client that pauses for
about as long would send its next request into a closing connection."""


class HttpServer:
    """Answers clients of one socket; make one with `start`."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None], grace_s: float) -> None:
        self._server = server
        self._serving = serving
        self._grace_s = grace_s

    @classmethod
    async def start(cls, app: FastAPI, sock: socket.socket, *, grace_s: float) -> HttpServer:
        """Listen on `sock`, which is closed at the end; returns once clients are answered.

        Args:
            grace_s: how long `stop` lets answers go on that have begun.

        Raises:
            OSError: the socket cannot be listened on.
            TimeoutError: it did not start.
        """
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(_serve(server, [sock]))
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not server.started:
                if serving.done():
                    await serving
                    raise OSError("the HTTP server ended while it started")
                await asyncio.sleep(0.005)
        return cls(server, serving, grace_s)

    @property
    def ended(self) -> bool:
        """Whether it answers no more."""
        return self._serving.done()

    async def stop(self) -> None:
        """Take no more clients, wait for the answers that go on, cut what is left. Idempotent."""
        self._server.should_exit = True
        await asyncio.wait({self._serving}, timeout=self._grace_s + 1.0)
        if not self._serving.done():
            self._serving.cancel()


async def _serve(server: uvicorn.Server, sockets: Sequence[socket.socket]) -> None:
    try:
        await server.serve(sockets=list(sockets))
    except SystemExit as error:  # uvicorn's way to say that it cannot start
        raise OSError("the HTTP server did not start") from error
