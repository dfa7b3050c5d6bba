"""Routers come, go and move, as the directory says; and go on being used where nobody says anything."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from moray.actors import router_pool
from moray.actors.messages import TokenOutput
from moray.actors.testing import EngineParts
from moray.configs.errors import ClusterError, RouterLostError

from ..served import Controller, Served, client_of, eventually, in_loop
from .answers import ask_all, request, start, undisturbed


def test_a_client_spreads_requests_and_hides_its_own_ids(parts: EngineParts) -> None:
    several = [Served(parts), Served(parts)]
    addresses = {f"router-{i}": served.server.address for i, served in enumerate(several)}

    async def test() -> None:
        async with client_of(addresses) as client:

            async def answer(name: str) -> list[TokenOutput]:
                return [output async for output in client.generate(request(parts, name))]

            answers = await asyncio.gather(*(answer("same id") for _ in range(6)))
            assert all(output.request_id == "same id" for outputs in answers for output in outputs)
            assert len({tuple(t for o in outputs for t in o.token_ids) for outputs in answers}) == 1
            status = await client.status()
            assert (status.health, [r.requests_finished for r in status.routers]) == ("ok", [3, 3])

    in_loop(test)
    for served in several:
        served.close()


def test_a_restored_router_is_found_at_its_new_address(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two routers comes back, the other one stays away; neither keeps the client from the other."""
    lost, moved = Served(parts), Served(parts)
    addresses = {"router-0": lost.server.address, "router-1": moved.server.address}

    async def test() -> None:
        nonlocal moved
        async with client_of(addresses) as client:
            await asyncio.to_thread(lost.close)
            await asyncio.to_thread(moved.close)
            await eventually(lambda: not client._pool.usable)
            with pytest.raises(RouterLostError, match="no router can be reached"):
                await anext(client.generate(request(parts)))
            status = await client.status()
            assert status.health == "unavailable"
            assert "router-0 is lost" in status.reason
            moved = await asyncio.to_thread(Served, parts)
            addresses["router-1"] = moved.server.address
            await eventually(lambda: bool(client._pool.usable))
            assert await ask_all(client, [request(parts)]) == await asyncio.to_thread(
                undisturbed, parts, [request(parts)]
            )
            assert (await client.status()).health == "degraded"

    in_loop(test)
    moved.close()


def test_a_router_that_is_added_is_used(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    first, second = start(routers, parts), start(routers, parts)
    addresses = {"router-0": first.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            addresses["router-1"] = second.server.address
            await eventually(lambda: len(client._pool.usable) == 2)
            requests = [request(parts, f"r{i}", seed=i) for i in range(4)]
            assert await ask_all(client, requests) == await asyncio.to_thread(undisturbed, parts, requests)

    in_loop(test)
    assert [served.router.stats().requests_finished for served in (first, second)] == [2, 2]


def test_a_router_that_leaves_ends_what_it_has(
    parts: EngineParts, routers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    leaves, stays = start(routers, parts), start(routers, parts)
    addresses = {"router-0": leaves.server.address, "router-1": stays.server.address}
    wanted = request(parts, max_tokens=40)

    async def test() -> None:
        async with client_of(addresses) as client:
            leaves.go.clear()
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: leaves.held)
            (connection,) = (c for c in client._pool.usable if c.outstanding)
            del addresses["router-0"]
            await eventually(lambda: connection.leaving)
            new = [request(parts, f"new{i}", seed=i) for i in range(3)]
            assert await ask_all(client, new) == await asyncio.to_thread(undisturbed, parts, new)
            assert stays.router.stats().requests_finished == 3
            assert [r.running for r in (await client.status()).routers] == [0, 1], "its counters go on to be shown"
            leaves.go.set()
            assert await answers == await asyncio.to_thread(undisturbed, parts, [wanted])
            await eventually(lambda: connection.lost == "closed")
            assert client.resubmitted == 0
            status = await client.status()
            assert (status.health, len(status.routers)) == ("ok", 1)

    caplog.set_level("INFO", "moray.front")
    in_loop(test)
    assert leaves.router.stats().requests_finished == 1
    assert "event=router_leaving front=front-0 router=router-0 in_flight=1" in caplog.text
    assert "event=router_lost" not in caplog.text


def test_a_router_that_ends_before_its_requests_hands_them_on(
    parts: EngineParts, routers: contextlib.ExitStack
) -> None:
    leaves, stays = start(routers, parts), start(routers, parts)
    addresses = {"router-0": leaves.server.address, "router-1": stays.server.address}
    wanted = request(parts, max_tokens=40)

    async def test() -> None:
        async with client_of(addresses) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: leaves.step > 3)
            leaves.go.clear()
            del addresses["router-0"]
            await eventually(lambda: len(client._pool.usable) == 1)
            await asyncio.to_thread(leaves.close)
            assert await answers == await asyncio.to_thread(undisturbed, parts, [wanted])
            assert client.resubmitted == 1
            assert (await client.status()).health == "ok", "it is not missed"

    in_loop(test)


def test_a_router_that_stays_after_all_keeps_its_connection(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    served = start(routers, parts)
    addresses = {"router-0": served.server.address}
    elsewhere = {"router-1": start(routers, parts).server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            served.go.clear()
            answers = asyncio.create_task(ask_all(client, [request(parts)]))
            await eventually(lambda: served.held)
            (connection,) = client._pool.usable
            for current, leaving in ((elsewhere, True), ({"router-0": served.server.address}, False)):
                addresses.clear()
                addresses.update(current)
                await eventually(lambda: connection.leaving == leaving)  # noqa: B023
            assert connection in client._pool.usable
            served.go.set()
            assert await answers == await asyncio.to_thread(undisturbed, parts, [request(parts)])

    in_loop(test)


@pytest.mark.parametrize("away", [ClusterError("it is restarting"), True, "empty"], ids=["fails", "hangs", "empty"])
def test_without_an_answer_the_known_routers_go_on_being_used(
    parts: EngineParts,
    routers: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    away: Exception | bool | str,
) -> None:
    """One that was cut off is connected to again, too. It is said once that nobody answers, and once that somebody does."""
    monkeypatch.setattr(router_pool, "_DIRECTORY_TIMEOUT_S", 0.05)
    controller, served = Controller(), start(routers, parts)
    addresses = {"router-0": served.server.address}

    def logged(event: str) -> int:
        return sum(f"event={event} " in record.getMessage() for record in caplog.records)

    async def test() -> None:
        async with client_of(addresses, controller=controller) as client:
            if away == "empty":
                addresses.clear()
            else:
                controller.away = away  # type: ignore[assignment]
            await eventually(lambda: logged("directory_unanswered") == 1)
            client._pool.usable[0].lose("cut off")
            asked = controller.asked
            await eventually(lambda: bool(client._pool.usable))
            assert await ask_all(client, [request(parts)]) == await asyncio.to_thread(
                undisturbed, parts, [request(parts)]
            )
            await eventually(lambda: controller.asked > asked + 3)
            controller.away = False
            addresses["router-0"] = served.server.address
            await eventually(lambda: logged("directory_answered") == 1)
            assert await ask_all(client, [request(parts)]) == await asyncio.to_thread(
                undisturbed, parts, [request(parts)]
            )

    in_loop(test)
    assert (logged("directory_unanswered"), logged("directory_answered")) == (1, 1)


def test_a_front_does_not_start_without_a_directory() -> None:
    async def test() -> None:
        with pytest.raises(ClusterError, match="it is restarting"):
            async with client_of({}, controller=Controller(away=ClusterError("it is restarting"))):
                pass

    in_loop(test)
