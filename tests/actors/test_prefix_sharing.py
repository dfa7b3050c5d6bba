"""A prefix that many requests bring in the same moment is computed once, and no bit of any answer depends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moray.actors.messages import GenerateRequest
from moray.actors.router import RouterSettings
from moray.actors.testing import SETTINGS, EngineParts, Recorder, random_prompt, run
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

PREFIX, REQUESTS, TOKENS = 512, 32, 4
SHARING = replace(SETTINGS, page_size=32, pages=128, max_context=576, token_budget=512, max_running=32)


@pytest.fixture(scope="module")
def read_once(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    checkpoint: Path = write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=6)
    return EngineParts(checkpoint)


@pytest.fixture
def parts(read_once: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(read_once) as parts:
        yield parts


def requests(parts: EngineParts, prefix: int = PREFIX) -> list[GenerateRequest]:
    """All with one prefix, and 1 to 40 tokens of their own."""
    shared = random_prompt(parts.config, 1, prefix)
    return [
        GenerateRequest(
            f"r{i}",
            shared + random_prompt(parts.config, 100 + i, 1 + i * 13 % 40),
            SamplingParams(TOKENS, 0.7 * (i % 2), seed=i, logprobs=2),
        )
        for i in range(REQUESTS)
    ]


def alone(parts: EngineParts, request: GenerateRequest, settings: RouterSettings) -> Recorder:
    """In a router that has computed nothing before."""
    return run(parts.engine(settings=settings), [request])


def test_a_shared_prefix_is_computed_once(parts: EngineParts) -> None:
    wanted = requests(parts)
    router = parts.engine(2, settings=SHARING)
    recorder = run(router, wanted)
    stats = router.stats()
    assert stats.prompt_tokens == PREFIX + sum(len(r.prompt_token_ids) - PREFIX for r in wanted)
    assert stats.prefix_hit_tokens == (REQUESTS - 1) * PREFIX
    assert (stats.preemptions, stats.requests_finished) == (0, REQUESTS)
    told = [recorder.outputs[request.request_id] for request in wanted]
    assert [outputs[0].cached_tokens for outputs in told] == [0] + [PREFIX] * (REQUESTS - 1)
    assert all(output.cached_tokens is None for outputs in told for output in outputs[1:])
    for request in wanted[::5]:
        assert recorder.outputs[request.request_id] == alone(parts, request, SHARING).outputs[request.request_id]


@pytest.mark.parametrize("when", ["cancelled", "preempted"])
def test_others_take_over_from_one_that_is_gone(parts: EngineParts, when: str) -> None:
    """The first one goes in the middle of the prefix: its full pages are kept, and every answer is what it would have been."""
    settings = replace(SHARING, page_size=8, pages=256, max_context=128, token_budget=20, max_running=16)
    wanted = requests(parts, prefix=64)[:6]
    router, recorder = parts.engine(settings=settings), Recorder()
    for request in wanted:
        router.submit(request, recorder)
    router.step()
    if when == "cancelled":
        router.cancel("r0")
    else:
        router.scheduler._preempt(next(iter(router.scheduler.running)))
    while router.busy:
        router.step()
        router.pool.check()
    own = sum(len(r.prompt_token_ids) - 64 for r in (wanted[1:] if when == "cancelled" else wanted))
    assert router.stats().prompt_tokens == 20 + (64 - 16) + own
    for request in wanted[1:] if when == "cancelled" else wanted:
        assert recorder.outputs[request.request_id] == alone(parts, request, settings).outputs[request.request_id]
