"""What clients see when a router dies under their requests: nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from moray.actors.front.app import create_app
from moray.actors.front.served_model import ServedModel
from moray.actors.testing import EngineParts
from moray.model import tiny_r1

from ..served import Served, client_of

TINY_R1 = Path(tiny_r1.__file__).parent

SIZES: dict[str, Any] = {"max_context": 512, "pages": 512}

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": QUESTION, "temperature": 0, "max_tokens": 60}),
    "chat-seeded": (
        "/v1/chat/completions",
        {"messages": QUESTION, "seed": 7, "max_tokens": 60, "logprobs": True, "top_logprobs": 2},
    ),
    "completion": (
        "/v1/completions",
        {"prompt": "Once upon a time", "seed": 3, "max_tokens": 40, "logprobs": 1, "ignore_eos": True},
    ),
    "stop-string": (
        "/v1/completions",
        {"prompt": ["Once upon", "One day"], "temperature": 0, "max_tokens": 40, "stop": [". "], "ignore_eos": True},
    ),
}


@pytest.fixture(scope="module")
def parts() -> EngineParts:
    return EngineParts(TINY_R1)


async def ask(addresses: Mapping[str, str], path: str, body: dict[str, Any]) -> Any:
    """How often requests moved, and the answer without what no two share; of a stream the sum of its events, by prompt."""
    model = ServedModel.load(TINY_R1, name="tiny-r1", max_context=SIZES["max_context"])
    async with client_of(addresses) as client:
        transport = httpx.ASGITransport(create_app(client, model))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
            response = await http.post(path, json={"model": "tiny-r1", **body})
        assert response.status_code == 200, response.text
        moved = client.resubmitted
    if not body.get("stream"):
        return moved, without_id(response.json())
    lines = response.text.split("\n\n")
    events = [without_id(json.loads(line.removeprefix("data: "))) for line in lines if line.startswith("data: {")]
    choices: dict[int, Any] = {}
    for event in events:
        for choice in event.pop("choices"):
            choices[choice["index"]] = extended(choices.get(choice["index"]), choice)
    return moved, (choices, events[-1])


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    """Nor what came from a cache, which is told but no part of the answer."""
    if usage := answer.get("usage"):
        assert usage.pop("prompt_tokens_details").keys() == {"cached_tokens"}
    return {k: v for k, v in answer.items() if k not in ("id", "created")}


def extended(value: Any, more: Any) -> Any:
    """Events say what is new; how many tokens one holds depends on who is faster."""
    if value is None or more is None or isinstance(value, int):
        return value if more is None else more
    if isinstance(value, dict):
        return {key: extended(value.get(key), more.get(key)) for key in [*value, *(k for k in more if k not in value)]}
    return value + more


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REQUESTS)
def test_answers_are_the_same(parts: EngineParts, case: str, stream: bool) -> None:
    """Text, thought, log-probabilities, ends and usage."""
    path, body = REQUESTS[case]
    if stream:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with (
        contextlib.closing(parts),
        contextlib.closing(Served(parts, dies_at=8, **SIZES)) as victim,
        contextlib.closing(Served(parts, **SIZES)) as survivor,
    ):
        both = {"router-0": victim.server.address, "router-1": survivor.server.address}
        moved, disturbed = asyncio.run(asyncio.wait_for(ask(both, path, body), 60))
        _, expected = asyncio.run(asyncio.wait_for(ask({"router-1": both["router-1"]}, path, body), 60))
    assert moved == 1
    assert disturbed == expected
