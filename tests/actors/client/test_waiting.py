"""Requests wait for a router, or for room at one: how long, which of them, and who must not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from moray.actors import router_client
from moray.actors.messages import GenerateRequest
from moray.actors.testing import EngineParts
from moray.configs.errors import QueueFullError, RouterLostError

from ..served import client_of, eventually, in_loop
from .answers import Answer, ask, ask_all, assert_lost_logged, request, start, undisturbed


def test_requests_wait_for_a_router_to_be_restored(
    parts: EngineParts,
    routers: contextlib.ExitStack,
    various: tuple[list[GenerateRequest], dict[str, Answer]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests, expected = various
    victims = [start(routers, parts, dies_at=step) for step in (10, 14)]
    addresses = {f"router-{i}": victim.server.address for i, victim in enumerate(victims)}

    async def test() -> None:
        async with client_of(addresses) as client:
            answers = asyncio.create_task(ask_all(client, requests))
            await eventually(lambda: client._homeless == 16)
            status = await client.status()
            assert status.health == "unavailable"
            assert "16 requests wait for a router to be restored" in status.reason
            with pytest.raises(RouterLostError, match="no router can be reached"):
                await ask(client, request(parts, "new"))
            restored = await asyncio.to_thread(start, routers, parts)
            addresses["router-0"] = restored.server.address
            assert await answers == expected
            assert (await client.status()).health == "degraded"
            assert restored.router.stats().requests_finished == 16

    in_loop(test)
    assert_lost_logged(caplog, r"event=router_lost router=router-\d in_flight=16 resubmitted=16 ")


def test_waiting_for_a_router_has_a_deadline(
    parts: EngineParts, routers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    addresses = {"router-0": start(routers, parts, dies_at=3).server.address}

    async def test() -> None:
        async with client_of(addresses, restore_timeout_s=0.3) as client:
            with pytest.raises(
                RouterLostError, match=r"none was restored within 0\.3 s: router-0 is lost: connection lost"
            ):
                await ask(client, request(parts))
            assert client._homeless == 0

    in_loop(test)
    assert_lost_logged(caplog, r"event=router_lost router=router-0 in_flight=1 resubmitted=0 ")


def test_a_request_cancelled_in_the_gap_is_not_submitted_again(
    parts: EngineParts, routers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    addresses = {"router-0": start(routers, parts, dies_at=3).server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            cancelled = asyncio.create_task(ask(client, request(parts, "cancelled")))
            await eventually(lambda: client._homeless == 1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            restored = await asyncio.to_thread(start, routers, parts)
            addresses["router-0"] = restored.server.address
            await eventually(lambda: bool(client._pool.usable))
            assert await ask_all(client, [request(parts)]) == await asyncio.to_thread(
                undisturbed, parts, [request(parts)]
            )
            assert client.resubmitted == 0
            stats = restored.router.stats()
            assert (stats.requests_finished, stats.requests_cancelled) == (1, 0)

    in_loop(test)
    assert_lost_logged(caplog, r"event=router_lost router=router-0 in_flight=1 resubmitted=0 ")


def test_a_closed_client_submits_nothing_again(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    served = [start(routers, parts) for _ in range(2)]
    addresses = {f"router-{i}": s.server.address for i, s in enumerate(served)}

    async def test() -> None:
        async with client_of(addresses) as client:
            outputs = client.generate(request(parts, max_tokens=120))
            await anext(outputs)
            served[0].go.clear()
            await client.aclose()
            served[0].go.set()
            with pytest.raises(RouterLostError, match="the front is shutting down"):
                _ = [output async for output in outputs]
            assert client.resubmitted == 0

    in_loop(test)
    assert sum(s.router.stats().requests_finished for s in served) == 0


def test_a_full_queue_is_passed_over(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """A new request goes to whichever router has room, and is refused only where none has."""
    small, large = (start(routers, parts, max_running=1, max_waiting=n) for n in (1, 3))
    addresses = {"router-0": small.server.address, "router-1": large.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            small.go.clear()
            large.go.clear()
            taken: list[asyncio.Task[dict[str, Answer]]] = []

            def in_flight() -> int:
                return sum(served.router._inbox.in_flight for served in (small, large))

            while small.router.has_room or large.router.has_room:
                name = f"r{len(taken)}"
                taken.append(asyncio.create_task(ask_all(client, [request(parts, name)])))
                await eventually(lambda: in_flight() == len(taken))
            assert small.router._inbox.in_flight < large.router._inbox.in_flight
            with pytest.raises(QueueFullError, match="requests are waiting already"):
                await ask(client, request(parts, "too much"))
            small.go.set()
            large.go.set()
            for number, answers in enumerate(taken):
                assert await answers == await asyncio.to_thread(undisturbed, parts, [request(parts, f"r{number}")])

    in_loop(test)


def test_an_admitted_request_is_never_refused_for_a_full_queue(
    parts: EngineParts, routers: contextlib.ExitStack
) -> None:
    """Those of a lost router wait until the other has room; meanwhile none that comes new goes before them."""
    requests = [request(parts, f"r{i}", max_tokens=40, seed=i) for i in range(4)]
    victim = start(routers, parts, dies_at=8)
    narrow = start(routers, parts, max_running=1, max_waiting=1)
    addresses = {"router-0": victim.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            victim.go.clear()
            answers = asyncio.create_task(ask_all(client, requests))
            await eventually(lambda: victim.router._inbox.in_flight == 4)
            addresses["router-1"] = narrow.server.address
            await eventually(lambda: len(client._pool.usable) == 2)
            narrow.go.clear()
            full = asyncio.create_task(ask_all(client, [request(parts, "first")]))
            await eventually(lambda: len(narrow.router.scheduler.running) == 1)
            victim.go.set()
            await eventually(lambda: client._crowded_out >= 3)
            with pytest.raises(QueueFullError, match="requests of a lost router are waiting for room"):
                await ask(client, request(parts, "new"))
            narrow.go.set()
            assert await answers == await asyncio.to_thread(undisturbed, parts, requests)
            assert await full == await asyncio.to_thread(undisturbed, parts, [request(parts, "first")])
            assert client.resubmitted == 4
            assert client._crowded_out == 0

    in_loop(test)


def test_what_waits_for_too_long_is_turned_away(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """The client hears of it as of a full queue, with when to come back; whoever runs already is not disturbed."""
    served = start(routers, parts, max_running=1, max_wait_s=1e-9)
    addresses = {"router-0": served.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            served.go.clear()
            answers = asyncio.create_task(ask_all(client, [request(parts, "first")]))
            await eventually(lambda: served.router._inbox.in_flight == 1)
            late = asyncio.create_task(ask(client, request(parts, "late")))
            await eventually(lambda: served.router._inbox.in_flight == 2)
            served.go.set()
            (output,) = await late
            assert (output.token_ids, output.finish_reason) == ([], "error")
            assert output.retry_after_s is not None
            assert await answers == await asyncio.to_thread(undisturbed, parts, [request(parts, "first")])

    in_loop(test)


def test_waiting_for_room_has_a_deadline(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_client, "_FULL_TIMEOUT_S", 0.3)
    victim, full = start(routers, parts, dies_at=8), start(routers, parts, max_running=1, max_waiting=1)
    addresses = {"router-0": victim.server.address, "router-1": full.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            monkeypatch.setattr(full.router, "submit", refuse)
            with pytest.raises(RouterLostError, match="no other has room: 9 requests are waiting"):
                await ask(client, request(parts))
            assert client._crowded_out == 0

    def refuse(*_: object) -> None:
        raise QueueFullError("9 requests are waiting", retry_after_s=1.0)

    in_loop(test)
