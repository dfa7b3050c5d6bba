"""Requests and what is answered to them, where routers die and where they do not."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from typing import Any

import pytest

from moray.actors.messages import GenerateRequest, TokenLogprobs, TokenOutput
from moray.actors.router_client import ClusterClient
from moray.actors.testing import EngineParts, random_prompt, run
from moray.model.sampling import SamplingParams

from ..served import Served

Answer = tuple[list[int], list[TokenLogprobs], str | None]


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


def assert_lost_logged(caplog: pytest.LogCaptureFixture, pattern: str, times: int = 1) -> None:
    """The losses of routers that match `pattern` were logged so many times."""
    found = [record.getMessage() for record in caplog.records if "event=router_lost" in record.getMessage()]
    assert sum(re.match(pattern, line) is not None for line in found) == times, found
