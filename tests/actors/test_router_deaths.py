"""Routers die under requests, which go on at others: every answer is the one that no death would have changed."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from moray.actors import router_client, router_connection
from moray.actors.messages import GenerateRequest, TokenLogprobs, TokenOutput
from moray.actors.router_client import ClusterClient
from moray.actors.testing import SETTINGS, EngineParts, random_prompt, run
from moray.configs.errors import QueueFullError, RouterLostError
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

from .served import Death, Served, client_of, eventually, in_loop

Answer = tuple[list[int], list[TokenLogprobs], str | None]


@pytest.fixture(scope="module")
def read_once(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    return EngineParts(write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=5))


@pytest.fixture
def parts(read_once: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(read_once) as parts:
        yield parts


@pytest.fixture(autouse=True)
def _reconnect_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_client, "_RECONNECT_PAUSE_S", 0.05)


@pytest.fixture
def routers() -> Iterator[contextlib.ExitStack]:
    """Routers entered here are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield stack


def start(routers: contextlib.ExitStack, parts: EngineParts, **options: Any) -> Served:
    return routers.enter_context(contextlib.closing(Served(parts, **options)))


def request(parts: EngineParts, name: str = "r", prompt: int = 6, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.8, "seed": 5, "logprobs": 2, **sampling})
    return GenerateRequest(name, random_prompt(parts.config, prompt, prompt), params)


def answer(outputs: Sequence[TokenOutput]) -> Answer:
    """An answer in sum; it must have ended once, at its end, and without an error."""
    assert [output.finish_reason is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    assert outputs[-1].error is None
    return (
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs or []],
        outputs[-1].finish_reason,
    )


def undisturbed(parts: EngineParts, requests: Sequence[GenerateRequest]) -> dict[str, Answer]:
    """What one router answers where nothing dies."""
    outputs = run(parts.engine(), requests).outputs
    return {request.request_id: answer(outputs[request.request_id]) for request in requests}


async def ask(client: ClusterClient, request: GenerateRequest) -> list[TokenOutput]:
    outputs = [output async for output in client.generate(request)]
    assert {output.request_id for output in outputs} == {request.request_id}
    return outputs


async def ask_all(client: ClusterClient, requests: Sequence[GenerateRequest]) -> dict[str, Answer]:
    outputs = await asyncio.gather(*(ask(client, request) for request in requests))
    return {request.request_id: answer(found) for request, found in zip(requests, outputs, strict=True)}


@pytest.fixture(scope="module")
def various(read_once: EngineParts) -> tuple[list[GenerateRequest], dict[str, Answer]]:
    """Requests and their answers: greedy and seeded, with log-probabilities and stop tokens or without, and with prompts
    around page boundaries."""
    requests = []
    for i in range(16):
        prompt = (1, 7, 8, 9, 16, 23, 40, 61)[i // 2]
        requests.append(
            request(
                read_once,
                f"r{i}",
                prompt,
                max_tokens=40,
                temperature=0.0 if i % 4 == 0 else 0.9,
                seed=i,
                logprobs=None if i % 8 == 7 else i % 3,
            )
        )
    plain = undisturbed(read_once, requests)
    # Some end at a stop token instead, well after the death.
    for i in (2, 5, 9, 12):
        tokens = plain[f"r{i}"][0]
        stop = next(token for token in tokens[25:] if token not in tokens[:25])
        requests[i] = replace(requests[i], sampling=replace(requests[i].sampling, stop_token_ids=(stop,)))
    expected = undisturbed(read_once, requests)
    assert sorted(reason or "" for _, _, reason in expected.values()) == ["length"] * 12 + ["stop"] * 4
    return requests, expected


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
    assert_logged(caplog, r"event=router_lost router=router-0 in_flight=8 resubmitted=8 duration_s=\d+\.\d+ reason=")


def assert_logged(caplog: pytest.LogCaptureFixture, pattern: str, times: int = 1) -> None:
    found = [record.getMessage() for record in caplog.records if "event=router_lost" in record.getMessage()]
    assert sum(re.match(pattern, line) is not None for line in found) == times, found


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
            assert client.resubmitted == (dies_at < 15), "4 steps of prefill, of which the last gives a token, and 11"

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
            await client._connect()
            assert await ask_all(client, requests) == expected
            assert client.resubmitted == 3

    in_loop(test)
    stats = survivor.router.stats()
    assert stats.preemptions > 0
    assert survivor.router.scheduler.prefix_hit_tokens > 0


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
    assert_logged(caplog, r"event=router_lost router=router-1 in_flight=16 resubmitted=16 ")


def test_a_request_outlives_several_routers(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """It moves to the second, which dies under it as well, and on to a third."""
    wanted = request(parts, prompt=20, max_tokens=40)
    addresses = {f"router-{i}": start(routers, parts, dies_at=9).server.address for i in range(3)}

    async def test() -> None:
        async with client_of(addresses) as client:
            answers = asyncio.create_task(ask_all(client, [wanted]))
            await eventually(lambda: client._homeless == 1)
            addresses["router-1"] = (await asyncio.to_thread(start, routers, parts)).server.address
            assert await answers == undisturbed(parts, [wanted])
            assert client.resubmitted == 3

    in_loop(test)


def test_a_request_under_which_every_router_dies_is_given_up(parts: EngineParts, routers: contextlib.ExitStack) -> None:
    """Six deaths are too many: a seventh router is not tried."""
    served = [start(routers, parts, dies_at=1) for _ in range(7)]
    addresses = {f"router-{i}": s.server.address for i, s in enumerate(served)}

    async def test() -> None:
        async with client_of(addresses) as client:
            with pytest.raises(RouterLostError, match="6 routers were lost while they answered this request"):
                await ask(client, request(parts))
            assert client.resubmitted == 5

    in_loop(test)
    assert sum(s.step == 0 for s in served) == 1


def test_waiting_for_a_router_has_a_deadline(
    parts: EngineParts, routers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    addresses = {"router-0": start(routers, parts, dies_at=3).server.address}

    async def test() -> None:
        async with client_of(addresses, restore_timeout_s=0.3) as client:
            with pytest.raises(RouterLostError, match=r"none was restored within 0\.3 s: router-0: connection lost"):
                await ask(client, request(parts))
            assert client._homeless == 0

    in_loop(test)
    assert_logged(caplog, r"event=router_lost router=router-0 in_flight=1 resubmitted=0 ")


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
            await eventually(lambda: client._is_connected("router-0"))
            assert await ask_all(client, [request(parts)]) == undisturbed(parts, [request(parts)])
            assert client.resubmitted == 0
            stats = restored.router.stats()
            assert (stats.requests_finished, stats.requests_cancelled) == (1, 0)

    in_loop(test)
    assert_logged(caplog, r"event=router_lost router=router-0 in_flight=1 resubmitted=0 ")


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
            client._connections["router-0"].lose("cut off")
            await eventually(lambda: client._connections["router-0"].outstanding == 1)
            await eventually(lambda: client.resubmitted == 1)
            assert len(served.router._in_flight) == 2, "the old attempt has not been cancelled yet"
            served.go.set()
            assert await answers == undisturbed(parts, [wanted])

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
                return sum(len(served.router._in_flight) for served in (small, large))

            while small.router.has_room or large.router.has_room:
                name = f"r{len(taken)}"
                taken.append(asyncio.create_task(ask_all(client, [request(parts, name)])))
                await eventually(lambda: in_flight() == len(taken))
            assert len(small.router._in_flight) < len(large.router._in_flight)
            with pytest.raises(QueueFullError, match="requests are waiting already"):
                await ask(client, request(parts, "too much"))
            small.go.set()
            large.go.set()
            for number, answers in enumerate(taken):
                assert await answers == undisturbed(parts, [request(parts, f"r{number}")])

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
            await eventually(lambda: len(victim.router._in_flight) == 4)
            addresses["router-1"] = narrow.server.address
            await client._connect()
            narrow.go.clear()
            full = asyncio.create_task(ask_all(client, [request(parts, "first")]))
            await eventually(lambda: len(narrow.router.scheduler.running) == 1)
            victim.go.set()
            await eventually(lambda: client._crowded_out >= 3)
            with pytest.raises(QueueFullError, match="requests of a lost router are waiting for room"):
                await ask(client, request(parts, "new"))
            narrow.go.set()
            assert await answers == undisturbed(parts, requests)
            assert await full == undisturbed(parts, [request(parts, "first")])
            assert client.resubmitted == 4
            assert client._crowded_out == 0

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
            await eventually(lambda: len(hangs.router._in_flight) == 1)
            monkeypatch.setattr(hangs.router, "submit", lambda *_: thaw.wait(30))
            new = asyncio.create_task(ask_all(client, requests[1:]))
            await eventually(lambda: client._connections["router-0"].outstanding == 2)
            addresses["router-1"] = well.server.address
            await client._connect()
            assert {**await before, **await new} == undisturbed(parts, requests)
            assert well.router.stats().requests_finished == 2

    try:
        in_loop(test)
    finally:
        thaw.set()
