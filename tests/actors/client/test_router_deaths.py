"""Routers die under requests, which go on at others: every answer is the one that no death would have changed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest

from moray.actors import router_client, router_connection
from moray.actors.messages import GenerateRequest
from moray.actors.testing import SETTINGS, EngineParts
from moray.configs.errors import RouterLostError

from ..served import Death, client_of, eventually, in_loop
from .answers import Answer, ask, ask_all, assert_lost_logged, request, start, undisturbed


@pytest.mark.parametrize("death", ["cut", "fails", "stops"])
def test_streams_outlive_a_router(
    parts: EngineParts,
    routers: contextlib.ExitStack,
    various: tuple[list[GenerateRequest], dict[str, Answer]],
    death: Death,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests, expected = various
    victim = start(routers, parts, dies_at=20, death=death)
    survivor = start(routers, parts)
    addresses = {"router-0": victim.server.address, "router-1": survivor.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            assert await ask_all(client, requests) == expected
            assert client.resubmitted == 8
            assert (await client.status()).health == "degraded"

    in_loop(test)
    stats = survivor.router.stats()
    assert (stats.requests_finished, stats.requests_cancelled, stats.requests_failed) == (16, 0, 0)
    assert survivor.router.pool.in_use == 0
    assert_lost_logged(
        caplog, r"event=router_lost router=router-0 in_flight=8 resubmitted=8 duration_s=\d+\.\d+ reason="
    )


@pytest.mark.parametrize("dies_at", range(16))
def test_it_makes_no_difference_when_it_dies(parts: EngineParts, routers: contextlib.ExitStack, dies_at: int) -> None:
    """In any chunk of the prefill, before any token, before the last one, and not at all."""
    wanted = request(parts, prompt=61)
    expected = undisturbed(parts, [wanted])
    victim = start(routers, parts, dies_at=dies_at, token_budget=16)
    survivor = start(routers, parts)
    addresses = {"router-0": victim.server.address, "router-1": survivor.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            assert await ask_all(client, [wanted]) == expected
            # At its very first step it may die before it has said that it took the request, which then was never its.
            moved = {0, 1} if dies_at == 0 else {int(dies_at < 15)}
            assert client.resubmitted in moved, "4 steps of prefill, of which the last gives a token, and 11"

    in_loop(test)
    assert survivor.router.stats().generated_tokens <= 12


def test_limits_and_cached_prefixes_may_differ(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """The router that takes over has too few pages, shorter chunks, and one of the prompts already."""
    requests = [request(parts, f"r{i}", prompt=20 + 8 * (i % 2), max_tokens=40, seed=i) for i in range(6)]
    expected = undisturbed(parts, requests)
    victim = start(routers, parts, dies_at=15)
    survivor = start(routers, parts, pages=20, token_budget=24)
    addresses = {"router-1": survivor.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            await ask(client, requests[0])
            addresses["router-0"] = victim.server.address
            await eventually(lambda: len(client._pool.usable) == 2)
            assert await ask_all(client, requests) == expected
            assert client.resubmitted == 3

    in_loop(test)
    stats = survivor.router.stats()
    assert stats.preemptions > 0
    assert survivor.router.scheduler.prefix_hit_tokens > 0


def test_a_request_outlives_several_routers(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """It moves to the second, which dies under it as well, and on to a third."""
    wanted = request(parts, prompt=20, max_tokens=40)
    addresses = {f"router-{i}": start(routers, parts, dies_at=9).server.address for i in range(3)}

    async def test() -> None:
        async with client_of(addresses) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: client._homeless == 1)
            addresses["router-1"] = (await asyncio.to_thread(start, routers, parts)).server.address
            assert await answers == await asyncio.to_thread(undisturbed, parts, [wanted])
            assert client.resubmitted == 3

    in_loop(test)


def test_a_request_under_which_every_router_dies_is_given_up(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """Six deaths are too many: a seventh router is not tried."""
    served = [start(routers, parts, dies_at=8) for _ in range(7)]  # the front has heard of it by then
    addresses = {f"router-{i}": s.server.address for i, s in enumerate(served)}

    async def test() -> None:
        async with client_of(addresses) as client:
            with pytest.raises(RouterLostError, match="6 routers were lost while they answered this request"):
                await ask(client, request(parts, max_tokens=100))
            assert client.resubmitted == 5

    in_loop(test)
    assert sum(s.step == 0 for s in served) == 1


def test_routers_that_die_of_something_else_are_not_held_against_a_request(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of eight has answered it for a while before."""
    monkeypatch.setattr(router_client, "_PROVEN_TOKENS", 3)
    wanted = request(parts, max_tokens=40)
    expected = undisturbed(parts, [wanted])
    served = [start(routers, parts, dies_at=4) for _ in range(8)]
    addresses = {f"router-{i}": s.server.address for i, s in enumerate([*served, start(routers, parts)])}

    async def test() -> None:
        async with client_of(addresses) as client:
            await eventually(lambda: len(client._pool.usable) == 9)
            assert await ask_all(client, [wanted]) == expected
            assert client.resubmitted == 8

    in_loop(test)


def test_a_connection_that_breaks_is_enough(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """The router lives, and still has the request when it gets it again; what it says of the old one is not heard."""
    served = start(routers, parts)
    wanted = request(parts, max_tokens=100)

    async def test() -> None:
        async with client_of({"router-0": served.server.address}) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: served.step > 5)
            served.go.clear()
            await eventually(lambda: served.held)
            client._pool.usable[0].lose("cut off")
            await eventually(lambda: [c.outstanding for c in client._pool.usable] == [1])
            await eventually(lambda: client.resubmitted == 1)
            assert served.router._inbox.in_flight == 2, "the old attempt has not been cancelled yet"
            served.go.set()
            assert await answers == await asyncio.to_thread(undisturbed, parts, [wanted])

    in_loop(test)
    stats = served.router.stats()
    assert (stats.requests_finished, stats.requests_cancelled) == (1, 1)


def test_a_router_without_its_experts_is_not_dead(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """Its requests fail when the experts stay away; another router could reach them no better."""
    table = parts.table(2)
    links = {"expert-host-0": parts.link(parts.host("expert-host-0", table), "inline")}
    blind = parts.router(table, links, replace(SETTINGS, restore_timeout_s=0.2))
    sick, well = start(routers, parts, router=blind), start(routers, parts)
    addresses = {"router-0": sick.server.address, "router-1": well.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            (last,) = await ask(client, request(parts))
            assert last.finish_reason == "error"
            assert "waited 0 s for them to be restored" in (last.error or "")
            assert client.resubmitted == 0

    in_loop(test)
    assert well.step == 0


def test_a_router_that_hangs_does_not_keep_a_new_request(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not say that it takes the request: given up, and what it had before goes on elsewhere as well."""
    monkeypatch.setattr(router_connection, "_SUBMIT_TIMEOUT_S", 0.3)
    hangs, well = start(routers, parts), start(routers, parts)
    addresses = {"router-0": hangs.server.address}
    requests = [request(parts, "before"), request(parts, "new")]
    thaw = threading.Event()

    async def test() -> None:
        async with client_of(addresses) as client:
            hangs.go.clear()
            before = asyncio.create_task(ask_all(client, requests[:1]))
            await eventually(lambda: hangs.router._inbox.in_flight == 1)
            monkeypatch.setattr(hangs.router, "submit", lambda *_: thaw.wait(30))
            new = asyncio.create_task(ask_all(client, requests[1:]))
            await eventually(lambda: client._pool.usable[0].outstanding == 2)
            addresses["router-1"] = well.server.address
            await eventually(lambda: len(client._pool.usable) == 2)
            assert {**await before, **await new} == await asyncio.to_thread(undisturbed, parts, requests)
            assert well.router.stats().requests_finished == 2

    try:
        in_loop(test)
    finally:
        thaw.set()
