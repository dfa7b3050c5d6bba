"""Routers that serve fronts over real sockets, in the test's own process, and that can be made to die when it matters."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from moray.actors.messages import ClusterStatus
from moray.actors.router import Router
from moray.actors.router_client import ClusterClient
from moray.actors.router_server import RouterServer
from moray.actors.testing import SECRET, SETTINGS, EngineParts

Death = Literal["cut", "fails", "stops"]
"""How a router goes: its sockets end, as a killed process' do; its step loop breaks; it is stopped in order."""

STATUS = ClusterStatus("m", 1, "ok", "", [], [])


class Served:
    """A running router and its server.

    Args:
        dies_at: the router dies when it begins this step; the first step is 0.
        death: how.
        settings: what is different from `SETTINGS`.

    Attributes:
        step: the step it is in; nothing runs while `go` is not set, and `held` says that a step waits for it.
    """

    def __init__(
        self,
        parts: EngineParts,
        *,
        dies_at: int | None = None,
        death: Death = "cut",
        router: Router | None = None,
        **settings: Any,
    ) -> None:
        self.router = router or parts.engine(2, settings=replace(SETTINGS, **settings))
        self.step = 0
        self.go = threading.Event()
        self.go.set()
        self.held = False
        self._forward = self.router.model.forward
        self._dies_at = dies_at
        self._death = death
        self.router.model.forward = self._step  # type: ignore[method-assign]
        self.server = RouterServer(self.router, bind_host="127.0.0.1", secret=SECRET)
        self.router.start()

    def die(self) -> None:
        """Die now, in the middle of a step if there is one."""
        if self._death == "cut":
            self.server.close()
        elif self._death == "stops":
            # Stopping waits for the step loop, which may be what calls this.
            threading.Thread(target=self.router.stop, daemon=True).start()
        else:
            raise RuntimeError("the model is broken")

    def close(self) -> None:
        self.go.set()
        self.server.close()
        self.router.stop()

    def _step(self, batch: Any) -> Any:
        self.held = not self.go.is_set()
        assert self.go.wait(30), "the test let it go on"
        self.held = False
        if self.step == self._dies_at:
            self.die()
        self.step += 1
        return self._forward(batch)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine with a deadline."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 40)

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def client_of(addresses: Mapping[str, str], *, restore_timeout_s: float = 30.0) -> AsyncIterator[ClusterClient]:
    """A front's client; what `addresses` holds is the controller's directory, also later on."""

    async def directory() -> Mapping[str, str]:
        return dict(addresses)

    async def describe() -> ClusterStatus:
        return STATUS

    client = ClusterClient(directory, describe, secret=SECRET, front_id="front-0", restore_timeout_s=restore_timeout_s)
    try:
        await client.connect()
        yield client
    finally:
        await client.aclose()


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is true; fails after 20 s."""
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        await asyncio.sleep(0.01)
