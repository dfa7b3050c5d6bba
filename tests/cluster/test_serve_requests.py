"""Many requests through the served endpoint, and what is left of them afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from .serve_process import Serve, eventually

pytestmark = pytest.mark.ray

REQUESTS = 200
AT_ONCE = 24


@dataclass(frozen=True)
class Plan:
    """One client: what it asks, and when it hangs up (None: it stays to the end)."""

    prompt: list[int]
    max_tokens: int
    stream: bool
    hang_up_after_chunks: int | None
    hang_up_after_s: float | None

    @property
    def stays(self) -> bool:
        return self.hang_up_after_chunks is None and self.hang_up_after_s is None


def plans(seed: int) -> list[Plan]:
    rng = random.Random(seed)
    shared = [rng.randrange(64, 400) for _ in range(96)]
    made = []
    for _ in range(REQUESTS):
        stream, leaves = rng.random() < 0.6, rng.random() < 0.5
        own = [rng.randrange(64, 400) for _ in range(rng.randrange(1, 80))]
        made.append(
            Plan(
                prompt=shared[: rng.choice((0, 32, 96))] + own,
                max_tokens=rng.randrange(1, 48),
                stream=stream,
                hang_up_after_chunks=rng.randrange(0, 12) if leaves and stream else None,
                hang_up_after_s=rng.uniform(0.0, 0.4) if leaves and not stream else None,
            )
        )
    return made


async def ask(client: httpx.AsyncClient, plan: Plan) -> str:
    """Play one client; "complete" if it got its whole answer, "started" if it saw part of it, "gone" if nothing."""
    body = {
        "model": "tiny-r1",
        "prompt": plan.prompt,
        "max_tokens": plan.max_tokens,
        "temperature": 1.0,
        "seed": 7,
        "ignore_eos": True,
        "stream": plan.stream,
        "return_token_ids": True,
    }
    if not plan.stream:
        try:
            async with asyncio.timeout(plan.hang_up_after_s):
                answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        except TimeoutError:
            return "gone"
        assert len(answer["choices"][0]["token_ids"]) == plan.max_tokens
        return "complete"
    tokens: list[int] = []
    chunks = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if plan.hang_up_after_chunks is not None and chunks >= plan.hang_up_after_chunks:
                break
            if line.startswith("data: {"):
                chunks += 1
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    tokens += choice["token_ids"]
    if len(tokens) == plan.max_tokens:
        return "complete"
    assert not plan.stays, f"{len(tokens)} of {plan.max_tokens} tokens"
    return "started" if tokens else "gone"


async def play(url: str, todo: list[Plan]) -> list[str]:
    free = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=240.0, trust_env=False, limits=limits) as client:

        async def one(plan: Plan) -> str:
            async with free:
                return await ask(client, plan)

        return await asyncio.gather(*(one(plan) for plan in todo))


def idle(status: dict[str, Any]) -> bool:
    return all(r["running"] == r["waiting"] == r["pages_in_use"] == 0 for r in status["routers"])


def test_requests_with_clients_that_hang_up_leave_nothing_behind(shm_server: Serve) -> None:
    before = shm_server.status()["routers"][0]

    fates = asyncio.run(play(shm_server.url, plans(seed=20260729)))

    status = eventually(lambda: (s := shm_server.status()) and idle(s) and s, "all requests have ended")
    (after,) = status["routers"]
    assert status["health"] == "ok"
    assert after["pages_free"] + after["pages_cached"] == after["pages_total"]
    finished, cancelled, failed = (
        after[f"requests_{end}"] - before[f"requests_{end}"] for end in ("finished", "cancelled", "failed")
    )
    complete, started = fates.count("complete"), fates.count("started")
    assert complete > REQUESTS // 4
    assert len(fates) - complete > REQUESTS // 5, "the seed must make clients hang up"
    assert failed == 0
    assert finished >= complete, "every client that stayed has its whole answer"
    # Those that hung up at once may never have reached a router; every other one ended, and ended once.
    assert complete + started <= finished + cancelled <= REQUESTS
    assert shm_server.process.poll() is None


def test_a_hung_up_stream_frees_its_pages(shm_server: Serve) -> None:
    body = {"model": "tiny-r1", "prompt": [100] * 64, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    before = shm_server.status()["routers"][0]
    with shm_server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        in_use = shm_server.status()["routers"][0]
        assert in_use["running"] == 1
        assert in_use["pages_in_use"] >= 2

    after = eventually(lambda: (s := shm_server.status()) and idle(s) and s, "the hung-up stream's pages are free")
    assert after["routers"][0]["requests_cancelled"] == before["requests_cancelled"] + 1
    assert after["routers"][0]["requests_finished"] == before["requests_finished"]
