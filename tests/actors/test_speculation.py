"""Drafted tokens never change an answer: with the MTP layer's drafts, with wrong ones and without any, it is the same one.

Token ids, log-probabilities and ends are compared for equality. tiny-r1's drafts are nearly always right, those of a random
model nearly always wrong.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors.messages import GenerateRequest, TokenLogprobs
from moray.actors.router import Router, RouterSettings
from moray.actors.testing import SETTINGS, EngineParts, Recorder, random_prompt, run
from moray.cluster.assembly import checkpoint_path
from moray.cluster.local import LLM
from moray.configs.errors import CheckpointError, ExpertsUnavailableError
from moray.model.draft_layer import DraftBatch
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint
from moray.model.tokenizer import ChatMessage, Tokenizer

QUESTIONS = ("What is 17 + 25?", "What is 8 * 13?", "Sort 5, 3, 9, 1.", "Which is larger, 34 or 43?", "Hello!")

Answer = tuple[list[int], list[TokenLogprobs], str | None]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> EngineParts:
    return EngineParts(checkpoint_path("tiny-r1"), drafts="on")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    return EngineParts(write_random_checkpoint(tmp_path_factory.mktemp("mtp"), seed=4, mtp=True), drafts="on")


@pytest.fixture
def parts(tiny: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(tiny) as parts:
        yield parts


@pytest.fixture(scope="module")
def requests() -> list[GenerateRequest]:
    """Greedy and sampled, with filters, log-probabilities and stop tokens or without."""
    tokenizer = Tokenizer.load(checkpoint_path("tiny-r1"))
    made = []
    for number, question in enumerate(QUESTIONS):
        prompt = tokenizer.apply_chat_template([ChatMessage("user", question)]).token_ids
        for temperature, top_p in ((0.0, 1.0), (1.0, 0.95)):
            sampling = SamplingParams(
                24 + 3 * number,
                temperature,
                top_p=top_p,
                seed=number << 40,
                logprobs=2 if number % 2 else None,
                stop_token_ids=(1,) if number < 3 else (),
            )
            made.append(GenerateRequest(f"{number}-{temperature}", prompt, sampling))
    return made


@pytest.fixture(scope="module")
def plain(requests: list[GenerateRequest]) -> dict[str, Answer]:
    """What an engine that has not read the MTP layer answers, to one request at a time."""
    with contextlib.closing(EngineParts(checkpoint_path("tiny-r1"))) as parts:
        router = parts.engine()
        found: dict[str, Answer] = {}
        for request in requests:
            found |= answers(router, [request])
        assert router.stats().drafted_tokens == 0
    return found


def drafting(tokens: int, settings: RouterSettings = SETTINGS, **changes: Any) -> RouterSettings:
    return replace(settings, draft_tokens=tokens, draft_always=True, **changes)


def answers(router: Router, requests: Sequence[GenerateRequest]) -> dict[str, Answer]:
    recorder = run(router, requests)
    return {r.request_id: answer(recorder, r.request_id) for r in requests}


def answer(recorder: Recorder, name: str) -> Answer:
    end = recorder.end(name)
    assert end is not None
    assert end.error is None
    return recorder.tokens(name), recorder.logprobs(name), end.finish_reason


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_the_same_answers_alone_and_batched(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer], hosts: int, tokens: int
) -> None:
    router = parts.engine(hosts, settings=drafting(tokens))
    assert answers(router, requests) == plain
    some = requests[hosts::3]
    alone: dict[str, Answer] = {}
    before = router.stats()
    for request in some:
        alone |= answers(router, [request])
    assert alone == {r.request_id: plain[r.request_id] for r in some}
    stats = router.stats()
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    if tokens == 1:
        assert stats.accepted_tokens >= 0.9 * stats.drafted_tokens, "they are nearly deterministic"
        assert stats.generated_tokens - before.generated_tokens >= 1.5 * (stats.steps - before.steps)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_model_whose_drafts_are_wrong_answers_the_same(random_model: EngineParts, tokens: int) -> None:
    with contextlib.closing(random_model) as parts:
        asked = [
            GenerateRequest(
                f"r{i}",
                random_prompt(parts.config, i, 5 + 9 * i),
                SamplingParams(20, 0.7 * (i % 2), seed=i, logprobs=1),
            )
            for i in range(6)
        ]
        expected = answers(parts.engine(), asked)
        router = parts.engine(2, settings=drafting(tokens))
        assert answers(router, asked) == expected
        stats = router.stats()
        assert stats.accepted_tokens < 0.2 * stats.drafted_tokens


def test_an_adversary_that_drafts_is_never_right(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = parts.engine(settings=drafting(3))
    assert router._drafter is not None
    never = next(t for t in range(parts.config.vocab_size) if not any(t in tokens for tokens, _, _ in plain.values()))
    monkeypatch.setattr(
        router._drafter._layer, "draft", lambda _hidden, batch, _choose: [[never] * count for count in batch.wanted]
    )
    assert answers(router, requests) == plain
    stats = router.stats()
    assert stats.drafted_tokens > 3 * 100
    assert stats.accepted_tokens == 0


def test_a_stop_token_within_an_accepted_run_ends_it(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer]
) -> None:
    tokens = plain["0-0.0"][0]
    router = parts.engine(settings=drafting(3))
    in_a_run = 0
    for stop in dict.fromkeys(tokens):
        sampling = replace(requests[0].sampling, stop_token_ids=(stop,), logprobs=1)
        recorder = run(router, [replace(requests[0], sampling=sampling)])
        expected = tokens[: tokens.index(stop) + 1]
        assert (recorder.tokens("0-0.0"), len(recorder.logprobs("0-0.0"))) == (expected, len(expected))
        last = recorder.outputs["0-0.0"][-1]
        assert last.finish_reason == "stop"
        in_a_run += len(last.token_ids) > 1
    assert in_a_run > 3


def test_max_tokens_and_the_end_of_the_context(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer]
) -> None:
    request, tokens = requests[0], plain["0-0.0"][0]
    router = parts.engine(settings=drafting(3))
    for most in range(1, 12):
        sampling = replace(request.sampling, max_tokens=most)
        found, _, reason = answers(router, [replace(request, sampling=sampling)])["0-0.0"]
        assert (found, reason) == (tokens[:most], "length")
    length = len(request.prompt_token_ids) + 9
    router = parts.engine(settings=drafting(3, max_context=length))
    found, _, reason = answers(router, [replace(request, sampling=replace(request.sampling, max_tokens=9))])["0-0.0"]
    assert (found, reason) == (tokens[:9], "length")


def test_preemptions_change_nothing(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer]
) -> None:
    router = parts.engine(settings=drafting(3, pages=20))
    assert answers(router, requests) == plain
    stats = router.stats()
    assert stats.preemptions > 0
    assert stats.accepted_tokens > 0


def test_chunks_of_prompts_and_prefix_hits_change_nothing(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer]
) -> None:
    router = parts.engine(settings=drafting(1, token_budget=16, page_size=4, pages=512))
    expected = answers(parts.engine(settings=replace(SETTINGS, page_size=4, pages=512)), requests)
    assert {name: tokens for name, (tokens, _, _) in expected.items()} == {n: a[0] for n, a in plain.items()}
    assert answers(router, requests) == expected
    before = router.stats()
    assert answers(router, requests) == expected
    assert router.scheduler.prefix_hit_tokens > 0
    stats = router.stats()
    verified = stats.drafted_tokens - before.drafted_tokens
    assert stats.accepted_tokens - before.accepted_tokens >= 0.9 * verified, "drafts are as good behind a cached prefix"


@pytest.mark.parametrize("already", [1, 2, 9, 23])
def test_another_router_goes_on_as_if_nothing_had_happened(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer], already: int
) -> None:
    for request in requests[:4]:
        tokens, logprobs, reason = plain[request.request_id]
        resumed = replace(request, generated_token_ids=tokens[:already])
        found = answers(parts.engine(2, settings=drafting(2)), [resumed])[request.request_id]
        assert found == (tokens[already:], logprobs[already:], reason)


def test_experts_that_are_missing_for_drafts_alone_cost_drafts(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = parts.engine(settings=drafting(2))
    assert router._drafter is not None
    draft, calls = router._drafter._layer.draft, iter(range(10_000))

    def sometimes(hidden_states: torch.Tensor, batch: DraftBatch, choose: Any) -> list[list[int]]:
        if next(calls) % 3 == 2:
            raise ExpertsUnavailableError("gone for a moment")
        return draft(hidden_states, batch, choose)

    monkeypatch.setattr(router._drafter._layer, "draft", sometimes)
    assert answers(router, requests) == plain
    assert 0 < router.stats().accepted_tokens < router.stats().drafted_tokens


def test_logits_behind_a_draft_that_are_no_numbers_are_as_if_not_computed(
    parts: EngineParts, requests: list[GenerateRequest], plain: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = parts.engine(settings=drafting(3))
    head = router.model.logits

    def overflowing(sampled: torch.Tensor) -> torch.Tensor:
        logits = head(sampled).clone()
        logits[2:] = math.nan
        return logits

    monkeypatch.setattr(router.model, "logits", overflowing)
    for request in requests[:4]:
        assert answers(router, [request])[request.request_id][0] == plain[request.request_id][0]
    assert router.stats().accepted_tokens > 0


# ---- which models --------------------------------------------------------------------------------------------------------


def test_on_needs_an_mtp_layer(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, seed=5)
    with pytest.raises(CheckpointError, match=r"num_nextn_predict_layers = 0.*routers\.speculate: auto or off"):
        LLM(path, routers={"speculate": "on"})
    with LLM(path) as llm:
        assert llm.cluster.config.draft_layers == 0
        assert llm.cluster.router.settings.draft_tokens == 0


def test_a_config_that_promises_a_layer_which_is_not_there(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}, seed=5)
    (path / "config.json").write_text(
        (path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.enorm\.weight is missing.*routers\.speculate"):
        LLM(path, routers={"speculate": "on"})
    with LLM(path) as llm:
        assert llm.cluster.config.draft_layers == 0
