"""The socket that fronts take their clients from: lent, shared, and kept while nobody has it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from moray.actors.front.http_server import HttpServer
from moray.cluster.front_door import FrontDoor, borrowed
from moray.configs.errors import ClusterError, ConfigError


@pytest.fixture
def door() -> Iterator[FrontDoor]:
    with contextlib.closing(FrontDoor("127.0.0.1", 0)) as door:
        yield door


def port_of(door: FrontDoor) -> int:
    with borrowed(door.name) as sock:
        port: int = sock.getsockname()[1]
        return port


def app_that_says(word: str) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    async def say() -> PlainTextResponse:
        return PlainTextResponse(word)

    return app


async def ask(port: int) -> str:
    async with httpx.AsyncClient(timeout=20) as client:
        return (await client.get(f"http://127.0.0.1:{port}/")).text


def test_nobody_is_taken_in_before_a_front_listens(door: FrontDoor) -> None:
    port = port_of(door)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    with borrowed(door.name) as sock:
        sock.listen()
        socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        FrontDoor("127.0.0.1", port)


def test_who_connects_between_two_fronts_is_answered_by_the_next(door: FrontDoor) -> None:
    async def main() -> None:
        port = port_of(door)
        first = await HttpServer.start(app_that_says("first"), borrowed(door.name), grace_s=1.0)
        assert await ask(port) == "first"
        await first.stop()
        assert first.ended
        waiting = asyncio.create_task(ask(port))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        second = await HttpServer.start(app_that_says("second"), borrowed(door.name), grace_s=1.0)
        assert await waiting == "second"
        await second.stop()

    asyncio.run(main())


def test_one_that_stands_still_takes_nobody(door: FrontDoor) -> None:
    async def main() -> None:
        port = port_of(door)
        idle = borrowed(door.name)  # listens, and never accepts
        idle.listen()
        server = await HttpServer.start(app_that_says("here"), borrowed(door.name), grace_s=1.0)
        assert [await ask(port) for _ in range(20)] == ["here"] * 20
        await server.stop()
        idle.close()

    asyncio.run(main())


def test_a_closed_door_lends_nothing() -> None:
    door = FrontDoor("127.0.0.1", 0)
    name, port = door.name, port_of(door)
    door.close()
    door.close()
    with pytest.raises(ClusterError, match="cannot be had"):
        borrowed(name)
    FrontDoor("127.0.0.1", port).close()


def test_other_users_get_nothing(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)  # as if whoever asks were another
    with pytest.raises(ClusterError, match="cannot be had"):
        borrowed(door.name)


def test_an_answer_that_goes_on_is_cut_at_the_end_of_its_grace(door: FrontDoor) -> None:
    async def main() -> None:
        app = FastAPI()
        begun = asyncio.Event()

        @app.get("/")
        async def never() -> None:
            begun.set()
            await asyncio.Event().wait()

        port = port_of(door)
        server = await HttpServer.start(app, borrowed(door.name), grace_s=1.0)
        asking = asyncio.create_task(ask(port))
        await begun.wait()
        await asyncio.wait_for(server.stop(), 10)
        assert server.ended
        await asyncio.wait({asking}, timeout=10)
        with contextlib.suppress(httpx.HTTPError):
            assert "Internal Server Error" in await asking

    asyncio.run(main())
