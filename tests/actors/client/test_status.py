"""What a front says of its cluster: fine, degraded or unavailable, and why."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from moray.actors import router_client, router_connection
from moray.actors.messages import ClusterStatus, Health
from moray.actors.router_server import RouterServer
from moray.actors.testing import SECRET, EngineParts
from moray.configs.errors import ClusterError

from ..served import Controller, Wire, client_of, eventually, in_loop
from .answers import ask_all, request, start, undisturbed


def test_status_when_experts_are_missing(parts: EngineParts) -> None:
    table = parts.table(2)
    router = parts.router(table, {"expert-host-0": parts.link(parts.host("expert-host-0", table), "inline")})
    server = RouterServer(router, bind_host="127.0.0.1", secret=SECRET)

    async def test() -> None:
        async with client_of({"router-0": server.address}) as client:
            status = await client.status()
            assert status.health == "unavailable"
            assert "router-0: 8 (layer, expert) pairs unreachable" in status.reason

    in_loop(test)
    server.close()


@pytest.mark.parametrize("away", [ClusterError("it is restarting"), True], ids=["fails", "hangs"])
def test_serving_goes_on_without_the_controller(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, away: Exception | bool
) -> None:
    """Degraded, for nothing would be restored; what only the controller knows is left open."""
    monkeypatch.setattr(router_client, "_DESCRIBE_TIMEOUT_S", 0.1)
    served, controller = start(routers, parts), Controller()

    async def test() -> None:
        async with client_of({"router-0": served.server.address}, controller=controller) as client:
            assert (await client.status()).health == "ok"
            controller.away = away
            status = await client.status()
            assert (status.health, status.model, status.epoch) == ("degraded", "m", 0)
            assert status.reason.startswith("the controller does not answer")
            assert [r.router_id for r in status.routers] == ["router-0"]
            assert await ask_all(client, [request(parts)]) == await asyncio.to_thread(
                undisturbed, parts, [request(parts)]
            )

    in_loop(test)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("ok", "ok"), ("degraded", "degraded"), ("starting", "degraded"), ("unavailable", "unavailable")],
)
def test_the_controllers_word(
    parts: EngineParts, routers: contextlib.ExitStack, said: Health, expected: Health
) -> None:
    """One that starts again beside routers that serve takes nothing away."""
    controller = Controller(ClusterStatus("m", 4, said, "it says so", [], []))
    addresses = {"router-0": start(routers, parts).server.address}

    async def test() -> None:
        async with client_of(addresses, controller=controller) as client:
            status = await client.status()
            assert (status.health, status.epoch) == (expected, 4)
            assert "it says so" in status.reason

    in_loop(test)


def test_fewer_replicas_than_wanted_are_degraded(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    controller = Controller(replace(Controller().status, missing_replicas=3, min_replicas=2))
    addresses = {"router-0": start(routers, parts).server.address}

    async def test() -> None:
        async with client_of(addresses, controller=controller) as client:
            status = await client.status()
            assert (status.health, status.reason) == (
                "degraded",
                "3 (layer, expert) pairs have fewer than 2 live replicas",
            )

    in_loop(test)


def test_a_router_that_does_not_answer_is_named_in_time(
    parts: EngineParts, routers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before it counts as lost; and without another that answers, nobody is served."""
    monkeypatch.setattr(router_connection, "_STATS_TIMEOUT_S", 0.1)
    frozen, well = start(routers, parts), start(routers, parts)
    wire = routers.enter_context(contextlib.closing(Wire(frozen)))
    addresses = {"router-0": wire.address, "router-1": well.server.address}

    async def test() -> None:
        async with client_of(addresses) as client:
            wire.freeze()
            status = await client.status()
            assert status.health == "degraded"
            assert status.reason.startswith("router-0 does not answer within 0.1 s")
            await asyncio.to_thread(well.close)
            await eventually(lambda: len(client._pool.usable) == 1)
            status = await client.status()
            assert status.health == "unavailable"
            assert status.reason.startswith("no router can be reached; router-1 is lost: ")

    in_loop(test)
