"""Routers that serve fronts over real sockets, in the test's own process, and that can be made to die when it matters."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from moray.actors import front_channel
from moray.actors.deadline import Deadline
from moray.actors.heartbeat import Heartbeat
from moray.actors.links.handshake import authenticate
from moray.actors.messages import ClusterStatus
from moray.actors.router import Router
from moray.actors.router_client import ClusterClient
from moray.actors.router_server import RouterServer
from moray.actors.testing import SECRET, SETTINGS, EngineParts

Death = Literal["cut", "fails", "stops"]
"""How a router goes: its sockets end, as a killed process' do; its step loop breaks; it is stopped in order."""


@dataclass
class Controller:
    """What a front asks of a controller.

    Attributes:
        status: what it says of the cluster.
        away: it raises this instead of answering; or it does not answer at all, if this is True.
        asked: how often it was asked.
    """

    status: ClusterStatus = field(default_factory=lambda: ClusterStatus("m", 1, "ok", "", [], []))
    away: Exception | bool = False
    asked: int = 0

    async def answer(self) -> None:
        self.asked += 1
        if isinstance(self.away, Exception):
            raise self.away
        if self.away:
            await asyncio.Event().wait()


class Served:
    """A running router and its server.

    Args:
        dies_at: the router dies when it begins this step; the first step is 0.
        death: how.
        heartbeat: of the fronts, as the server has it.
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
        heartbeat: Heartbeat = front_channel.OF_FRONTS,
        **settings: Any,
    ) -> None:
        self.router = router or parts.engine(2, settings=replace(SETTINGS, **settings))
        self.step = 0
        self.go = threading.Event()
        self.go.set()
        self.held = False
        self._forward = self.router.model.sampled_states
        self._dies_at = dies_at
        self._death = death
        pytest.MonkeyPatch().setattr(self.router.model, "sampled_states", self._step)  # for as long as the router lives
        self.server = RouterServer(self.router, bind_host="127.0.0.1", secret=SECRET, heartbeat=heartbeat)
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


class Wire:
    """A stretch of network before a router, which can be frozen: the ends keep their connections, and hear nothing.

    That is all that one end sees of the other's process being stopped. Once thawed, what was sent meanwhile arrives.
    """

    def __init__(self, served: Served) -> None:
        host, _, port = served.server.address.rpartition(":")
        self._target = host, int(port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._flows, self._still = threading.Event(), threading.Event()
        self._flows.set()
        self._closed = False
        self._other_end: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        """Nothing gets through from now on."""
        self._still.clear()
        self._flows.clear()
        assert self._still.wait(20)

    def thaw(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self._closed = True
        self._thread.join(20)
        for sock in [self._listening, *self._other_end]:
            sock.close()

    def _run(self) -> None:
        while not self._closed:
            if not self._flows.is_set():
                self._still.set()
                self._flows.wait(0.01)
                continue
            for sock in select.select([self._listening, *self._other_end], [], [], 0.01)[0]:
                if sock is self._listening:
                    near, far = sock.accept()[0], socket.create_connection(self._target, 10)
                    self._other_end |= {near: far, far: near}
                elif sock in self._other_end:  # else closed with its other end
                    self._pass_on(sock)

    def _pass_on(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(1 << 16)
            if data:
                self._other_end[sock].sendall(data)
                return
        except OSError:
            pass  # an end that is gone takes the other with it, as at its orderly end
        other = self._other_end.pop(sock)
        del self._other_end[other]
        sock.close()
        other.close()


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine with a deadline."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 40)

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def client_of(
    addresses: Mapping[str, str],
    *,
    restore_timeout_s: float = 30.0,
    refresh_s: float = 0.05,
    heartbeat: Heartbeat = front_channel.OF_ROUTERS,
    controller: Controller | None = None,
) -> AsyncIterator[ClusterClient]:
    """A front's client; what `addresses` holds is the controller's directory, also later on."""
    controller = controller or Controller()

    async def directory() -> Mapping[str, str]:
        await controller.answer()
        return dict(addresses)

    async def describe() -> ClusterStatus:
        await controller.answer()
        return controller.status

    client = ClusterClient(
        directory,
        describe,
        secret=SECRET,
        front_id="front-0",
        restore_timeout_s=restore_timeout_s,
        refresh_s=refresh_s,
        heartbeat=heartbeat,
    )
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


def raw_front(served: Served, *, receive_buffer: int | None = None) -> socket.socket:
    """A socket that has passed for a front, `rogue`, and says nothing further by itself."""
    host, _, port = served.server.address.rpartition(":")
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(10)
    sock.connect((host, int(port)))
    authenticate(
        sock,
        secret=SECRET,
        identity="rogue",
        channel=front_channel.CHANNEL,
        initiator=True,
        deadline=Deadline.after(10),
    )
    return sock
