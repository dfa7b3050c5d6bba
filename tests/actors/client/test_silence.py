"""Routers and fronts that fall silent with their sockets open, as stopped processes do: each is noticed by the other."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from moray.actors import front_channel, router_server
from moray.actors.heartbeat import Heartbeat, Silence
from moray.actors.router_connection import RouterConnection
from moray.actors.testing import SECRET, EngineParts
from moray.configs.errors import LinkError

from ..served import Served, Wire, client_of, eventually, in_loop, raw_front
from .answers import ask_all, assert_lost_logged, request, start, undisturbed

FAST = Heartbeat(every_s=0.05, silent_after_s=0.6)
"""Silence for short tests; far more than threads have to wait for each other on a busy machine."""

PATIENT = Heartbeat(every_s=0.05, silent_after_s=20.0)
"""For the end that is not to be the first to notice."""

Wired = Callable[[Served], Wire]


@pytest.fixture
def wired(routers: contextlib.ExitStack) -> Wired:
    """Puts a wire before a router."""
    return lambda served: routers.enter_context(contextlib.closing(Wire(served)))


# ---- the reckoning


def test_silence_is_the_time_since_something_was_heard() -> None:
    now = 100.0
    silence = Silence(Heartbeat(0.5, 2.0), clock=lambda: now)
    for _ in range(3):
        assert silence.next_look_s == 0.5
        now += silence.next_look_s
        assert not silence.too_long()
    silence.heard()
    now += 0.4
    assert not silence.too_long()
    for _ in range(3):
        now += 0.5
        assert not silence.too_long()
    assert silence.next_look_s == pytest.approx(0.1)
    now += 0.1
    assert silence.too_long()
    assert silence.seconds == pytest.approx(2.0)


def test_time_in_which_one_could_not_listen_is_not_the_others_silence() -> None:
    now = 0.0
    silence = Silence(Heartbeat(0.5, 2.0), clock=lambda: now)
    for looks in range(1, 5):
        now += 60.0
        assert silence.too_long() == (looks == 4), "each look counts for one beat, however long it took to come"


# ---- routers that freeze


def test_streams_go_on_elsewhere_when_a_router_freezes(
    parts: EngineParts, routers: contextlib.ExitStack, wired: Wired, caplog: pytest.LogCaptureFixture
) -> None:
    """What it still says once it goes on reaches nobody, and it lets go of what it had."""
    frozen, well = start(routers, parts, heartbeat=PATIENT), start(routers, parts, heartbeat=PATIENT)
    wire = wired(frozen)
    addresses = {"router-0": wire.address, "router-1": well.server.address}
    requests = [request(parts, f"r{i}", prompt=9 + i, max_tokens=60, seed=i) for i in range(4)]
    expected = undisturbed(parts, requests)

    async def test() -> None:
        async with client_of(addresses, heartbeat=FAST) as client:
            answers = asyncio.create_task(ask_all(client, requests))
            await eventually(lambda: frozen.step > 5 and len(frozen.router.scheduler.running) == 2)
            wire.freeze()
            frozen.go.clear()
            assert await answers == expected
            assert client.resubmitted == 2
            status = await client.status()
            assert status.health == "degraded"
            assert re.search(r"router-0 is lost: heard nothing for 0\.6 s", status.reason)
            assert [r.router_id for r in status.routers] == ["router-0"], (
                "the one that answers; both call themselves so"
            )
            frozen.go.set()
            wire.thaw()
            await eventually(lambda: frozen.router.stats().requests_cancelled == 2)
            await eventually(lambda: len(client._pool.usable) == 2)
            assert (await client.status()).health == "ok"
            assert await ask_all(client, requests) == expected

    in_loop(test)
    assert frozen.router.pool.in_use == 0
    assert_lost_logged(caplog, r"event=router_lost router=router-0 in_flight=2 resubmitted=2 .* reason='heard nothing")


def test_a_request_on_its_way_to_a_frozen_router_goes_to_another(
    parts: EngineParts, routers: contextlib.ExitStack, wired: Wired
) -> None:
    frozen, well = start(routers, parts, heartbeat=PATIENT), start(routers, parts, heartbeat=PATIENT)
    wire = wired(frozen)
    expected = undisturbed(parts, [request(parts)])

    async def test() -> None:
        async with client_of({"router-0": wire.address, "router-1": well.server.address}, heartbeat=FAST) as client:
            wire.freeze()
            assert await ask_all(client, [request(parts)]) == expected

    in_loop(test)
    assert well.router.stats().requests_finished == 1


def test_requests_of_the_only_router_wait_until_it_goes_on(
    parts: EngineParts, routers: contextlib.ExitStack, wired: Wired
) -> None:
    served = start(routers, parts, heartbeat=PATIENT)
    wire = wired(served)
    wanted = request(parts, max_tokens=60)
    expected = undisturbed(parts, [wanted])

    async def test() -> None:
        async with client_of({"router-0": wire.address}, heartbeat=FAST) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: served.step > 5)
            wire.freeze()
            await eventually(lambda: client._homeless == 1)
            assert (await client.status()).health == "unavailable"
            wire.thaw()
            assert await answers == expected

    in_loop(test)
    assert served.router.stats().requests_finished <= 2, "what it computed in the dark was heard by nobody"


def test_a_long_step_is_not_silence(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    served = start(routers, parts, heartbeat=PATIENT)
    expected = undisturbed(parts, [request(parts)])

    async def test() -> None:
        async with client_of({"router-0": served.server.address}, heartbeat=FAST) as client:
            served.go.clear()
            answers = asyncio.create_task(ask_all(client, [request(parts)]))
            await eventually(lambda: served.held)
            await asyncio.sleep(1.5 * FAST.silent_after_s)
            assert client._pool.usable
            served.go.set()
            assert await answers == expected
            assert client.resubmitted == 0

    in_loop(test)


def test_a_front_whose_loop_is_held_up_gives_nobody_up(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    served = start(routers, parts, heartbeat=PATIENT)
    wanted = request(parts, max_tokens=100)
    expected = undisturbed(parts, [wanted])

    async def test() -> None:
        async with client_of({"router-0": served.server.address}, heartbeat=FAST) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: served.step > 5)
            for _ in range(2):
                time.sleep(2 * FAST.silent_after_s)
                await asyncio.sleep(0)
            assert await answers == expected
            assert client.resubmitted == 0

    in_loop(test)


def test_a_frozen_router_is_not_waited_for_at_the_handshake(
    parts: EngineParts, routers: contextlib.ExitStack, wired: Wired
) -> None:
    wire = wired(start(routers, parts, heartbeat=PATIENT))
    wire.freeze()

    async def test() -> None:
        with pytest.raises(LinkError, match="sent nothing before the deadline"):
            await RouterConnection.open("router-0", wire.address, secret=SECRET, identity="front-0", timeout_s=0.1)

    in_loop(test)


def test_a_frozen_router_keeps_the_front_from_no_other(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is still being connected to, another is lost, restored and found."""
    frozen, mortal = start(routers, parts, heartbeat=PATIENT), start(routers, parts, dies_at=3)
    addresses = {"router-1": mortal.server.address}
    opened = RouterConnection.open

    async def hangs(name: str, address: str, **options: Any) -> RouterConnection:
        if name == "router-0":
            await asyncio.Event().wait()
        return await opened(name, address, **options)

    monkeypatch.setattr(RouterConnection, "open", hangs)
    expected = undisturbed(parts, [request(parts)])

    async def test() -> None:
        async with client_of(addresses) as client:
            addresses["router-0"] = frozen.server.address
            await eventually(lambda: "router-0" in client._pool._opening)
            answers = asyncio.create_task(ask_all(client, [request(parts)]))
            await eventually(lambda: client._homeless == 1)
            addresses["router-1"] = (await asyncio.to_thread(start, routers, parts)).server.address
            assert await answers == expected

    in_loop(test)


# ---- fronts that freeze


def test_a_silent_front_is_dropped_and_may_come_back(
    parts: EngineParts, routers: contextlib.ExitStack, wired: Wired, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds no pages meanwhile. The front finds its connection closed, and goes on with its requests."""
    served = start(routers, parts, heartbeat=FAST)
    wire = wired(served)
    wanted = request(parts, max_tokens=100)
    expected = undisturbed(parts, [wanted])

    async def test() -> None:
        async with client_of({"router-0": wire.address}, heartbeat=PATIENT) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: served.step > 5)
            assert served.server.silent_fronts() == ()
            served.go.clear()
            wire.freeze()
            await eventually(lambda: served.server.silent_fronts() == ("front-0",))
            served.go.set()
            await eventually(lambda: served.router.stats().requests_cancelled == 1)
            assert served.router.pool.in_use == 0
            wire.thaw()
            assert await answers == expected
            assert client.resubmitted == 1
            assert served.server.silent_fronts() == ()

    in_loop(test)
    (line,) = [r.getMessage() for r in caplog.records if "event=front_silent" in r.getMessage()]
    assert re.fullmatch(r"event=front_silent router=router-0 front=front-0 silent_s=0\.6\d\d cancelled=1", line)


def test_a_front_that_never_comes_back_is_forgotten(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start(routers, parts, heartbeat=FAST)
    with contextlib.closing(raw_front(served)) as sock:
        while sock.recv(1 << 16):
            pass  # heartbeats, until it is dropped for having none
    assert served.server.silent_fronts() == ("rogue",)
    monkeypatch.setattr(served.server, "_remember_silent_s", 0.0)
    assert served.server.silent_fronts() == ()


def test_a_front_that_speaks_but_does_not_read_is_silent_as_well(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_server, "_MAX_QUEUED_MESSAGES", 16)
    served = start(routers, parts, heartbeat=PATIENT)
    with contextlib.closing(raw_front(served, receive_buffer=4096)) as sock:
        with contextlib.suppress(ConnectionError):
            for number in range(1_000_000):
                sock.sendall(front_channel.encode(["stats", number]))
        assert served.server.silent_fronts() == ("rogue",)
