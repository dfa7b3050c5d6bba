"""The router: every request ends exactly once, and for the reason it should."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moray.actors.messages import GenerateRequest, TokenOutput
from moray.actors.router import Router
from moray.actors.testing import SETTINGS, EngineParts, Recorder, random_prompt, run
from moray.configs.errors import ContextTooLongError, QueueFullError, RequestError, RouterLostError
from moray.model.compute import Compute
from moray.model.loading import load_experts, open_model
from moray.model.reference import reference_logits
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint
from moray.model.weights import mlp_weights

from .scripted_hosts import Clock, ScriptedHost


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=5)


@pytest.fixture(scope="module")
def read_once(checkpoint: Path) -> EngineParts:
    return EngineParts(checkpoint)


@pytest.fixture
def parts(read_once: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(read_once) as parts:
        yield parts


def request(parts: EngineParts, name: str = "r", prompt: int = 6, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return GenerateRequest(name, random_prompt(parts.config, len(name) + prompt, prompt), params)


def test_ends_at_max_tokens(parts: EngineParts) -> None:
    recorder = run(parts.engine(), [request(parts, max_tokens=5)])
    assert len(recorder.tokens("r")) == 5
    assert recorder.outputs["r"][-1].finish_reason == "length"
    assert [o.finish_reason for o in recorder.outputs["r"][:-1]] == [None] * 4


def test_ends_after_a_stop_token_which_is_reported(parts: EngineParts) -> None:
    tokens = run(parts.engine(), [request(parts, max_tokens=12)]).tokens("r")
    stop = tokens[4]
    recorder = run(parts.engine(), [request(parts, max_tokens=12, stop_token_ids=(stop, 271))])
    assert recorder.tokens("r") == tokens[: tokens.index(stop) + 1]
    assert recorder.outputs["r"][-1].finish_reason == "stop"


def test_a_stop_token_that_is_also_the_last_counts_as_stop(parts: EngineParts) -> None:
    first = run(parts.engine(), [request(parts, max_tokens=1)]).tokens("r")[0]
    recorder = run(parts.engine(), [request(parts, max_tokens=1, stop_token_ids=(first,))])
    assert recorder.outputs["r"] == [TokenOutput("r", [first], None, "stop")]


@pytest.mark.parametrize("already", [1, 5, 10, 11, 27])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_goes_on_where_another_router_left_it(parts: EngineParts, temperature: float, already: int) -> None:
    """Tokens, log-probabilities and the end are those of one go; what was generated before is not said again."""
    whole = request(parts, max_tokens=28, temperature=temperature, seed=3, logprobs=2)
    before = run(parts.engine(), [whole]).outputs["r"]
    router = parts.engine(settings=replace(SETTINGS, token_budget=16))
    generated = [token for output in before[:already] for token in output.token_ids]
    recorder = run(router, [replace(whole, generated_token_ids=generated)])
    assert recorder.outputs["r"] == before[already:]
    stats = router.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (6, 28 - already)


def test_fills_the_context_to_the_last_token(parts: EngineParts) -> None:
    recorder = run(parts.engine(), [request(parts, prompt=100, max_tokens=28)])
    assert len(recorder.tokens("r")) == 28


SAMPLING_REFUSALS: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 0},
    "max_tokens-text": {"max_tokens": "8"},
    "temperature": {"temperature": -0.5},
    "temperature-nan": {"temperature": math.nan},
    "temperature-infinite": {"temperature": math.inf},
    "temperature-text": {"temperature": "hot"},
    "top_k": {"top_k": -1},
    "top_k-number": {"top_k": 2.5},
    "top_p": {"top_p": 1.5},
    "top_p-nan": {"top_p": math.nan},
    "min_p": {"min_p": -0.1},
    "seed": {"seed": 1 << 64},
    "seed-none": {"seed": None},
    "logprobs": {"logprobs": -1},
    "logprobs-bool": {"logprobs": True},
    "stop_token_ids": {"stop_token_ids": ("a",)},
}


@pytest.mark.parametrize("case", SAMPLING_REFUSALS)
def test_sampling_that_cannot_be_is_refused(parts: EngineParts, case: str) -> None:
    router, recorder = parts.engine(), Recorder()
    field = case.split("-")[0]
    with pytest.raises(RequestError, match=field) as refusal:
        router.submit(request(parts, **SAMPLING_REFUSALS[case]), recorder)
    assert refusal.value.param == field
    assert not router.busy
    assert recorder.outputs == {}


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "no tokens"), ([272], "272"), ([-1], "-1"), ([1.5], "1.5"), (["a"], "'a'")], ids=str
)
def test_prompts_that_cannot_be_are_refused(parts: EngineParts, tokens: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parts.engine().submit(GenerateRequest("r", tokens, SamplingParams(4)), Recorder())


@pytest.mark.parametrize(
    ("generated", "message"),
    [([272], "272"), ([-1], "-1"), (["a"], "'a'"), ([1, 2, 3, 4], "max_tokens = 4"), ([1, 7], "stop token")],
    ids=str,
)
def test_answers_that_cannot_be_gone_on_with_are_refused(
    parts: EngineParts, generated: list[Any], message: str
) -> None:
    request = GenerateRequest("r", [1], SamplingParams(4, stop_token_ids=(7,)), generated)
    with pytest.raises(RequestError, match=message) as refusal:
        parts.engine().submit(request, Recorder())
    assert refusal.value.param == "generated_token_ids"


@pytest.mark.parametrize(("prompt", "max_tokens"), [(129, 1), (128, 1), (64, 65)])
def test_what_does_not_fit_the_context_is_refused(parts: EngineParts, prompt: int, max_tokens: int) -> None:
    with pytest.raises(ContextTooLongError, match=f"{prompt} prompt tokens and max_tokens = {max_tokens}"):
        parts.engine().submit(request(parts, prompt=prompt, max_tokens=max_tokens), Recorder())


def test_a_full_queue_refuses_until_it_drains(parts: EngineParts) -> None:
    router = parts.engine(settings=replace(SETTINGS, max_waiting=3, max_running=1))
    recorder = Recorder()
    for name in "abc":
        assert router.has_room
        router.submit(request(parts, name), recorder)
    assert not router.has_room
    with pytest.raises(QueueFullError, match="3 requests are waiting") as refusal:
        router.submit(request(parts, "d"), recorder)
    assert refusal.value.retry_after_s >= 1
    router.step()  # one runs now, two wait
    router.submit(request(parts, "d"), recorder)
    with pytest.raises(QueueFullError):
        router.submit(request(parts, "e"), recorder)
    while router.busy:
        router.step()
    assert {name for name in "abcde" if recorder.end(name)} == set("abcd")


def test_what_has_waited_for_too_long_is_turned_away(parts: EngineParts) -> None:
    router = parts.engine(settings=replace(SETTINGS, max_running=1, max_wait_s=1e-9))
    recorder = run(router, [request(parts, name) for name in ("first", "second")])
    end = recorder.end("second")
    assert end is not None
    assert (end.token_ids, end.finish_reason, end.error) == (
        [],
        "error",
        "the request waited for 1e-09 s, and there is no room for it yet",
    )
    assert end.retry_after_s is not None
    assert end.retry_after_s >= 1
    assert len(recorder.tokens("first")) == 8
    stats = router.stats()
    assert (stats.requests_finished, stats.requests_failed, stats.requests_refused) == (1, 0, 1)


def test_time_between_two_steps_is_time_that_requests_wait(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would be turned away after its client was told that there is an answer. Idle time is nobody's."""
    router, recorder, now = parts.engine(settings=SETTINGS), Recorder(), [0.0]
    clock = SimpleNamespace(**vars(time) | {"perf_counter": lambda: now[0]})  # steps take no time
    monkeypatch.setattr("moray.actors.router.time", clock)
    took: list[float] = []
    monkeypatch.setattr(router.scheduler, "took", lambda _, seconds: took.append(seconds))
    for name in ("a", "b"):
        router.submit(request(parts, name), recorder)
        while router.step():
            now[0] += 5.0
        assert len(took) > 2
        assert took == [0.0] + [5.0] * (len(took) - 1)
        took.clear()
        now[0] += 1000.0


def test_answers_that_have_begun_are_not_turned_away(parts: EngineParts) -> None:
    """Neither what was preempted nor what another router began."""
    router = parts.engine(settings=replace(SETTINGS, pages=16, max_running=2, max_wait_s=1e-9))
    begun = [request(parts, f"r{i}", prompt=20, max_tokens=60) for i in range(4)]
    begun[2:] = [replace(one, generated_token_ids=[1, 2]) for one in begun[2:]]
    recorder = run(router, begun)
    assert router.stats().preemptions > 0
    assert [len(recorder.tokens(f"r{i}")) for i in range(4)] == [60, 60, 58, 58]


def test_a_queue_that_would_take_too_long_refuses_at_once(parts: EngineParts) -> None:
    router, recorder = parts.engine(settings=replace(SETTINGS, max_running=1, max_wait_s=30.0)), Recorder()
    for name in "ab":
        router.submit(request(parts, name), recorder)
    router.step()
    router.scheduler.took([], 20.0)  # so long a step has just let one of them in
    with pytest.raises(
        QueueFullError, match="1 requests are waiting, so that this one would for 40 s; the limit is 30"
    ) as e:
        router.submit(request(parts, "d"), recorder)
    assert e.value.retry_after_s == pytest.approx(40.0, rel=0.05)
    assert router.stats().requests_refused == 1
    while router.busy:
        router.step()
    assert {name for name in "abd" if recorder.end(name)} == set("ab")
    router.submit(request(parts, "d"), recorder)  # there is room at once, however slow it was


def test_a_target_bounds_what_is_computed_beside_answers(parts: EngineParts) -> None:
    """One that no step can meet leaves the least: one answer at a time. The answers are the same."""
    wanted = [request(parts, f"r{i}", prompt=40, max_tokens=6) for i in range(4)]
    router, recorder = parts.engine(settings=replace(SETTINGS, target_itl_s=1e-9)), Recorder()
    router.submit(wanted[0], recorder)
    router.step()
    router.step()
    for one in wanted[1:]:
        router.submit(one, recorder)
    running = []
    while router.busy:
        router.step()
        running.append(router.stats().running)
    assert max(running) == 1
    expected = run(parts.engine(), wanted)
    assert [recorder.tokens(f"r{i}") for i in range(4)] == [expected.tokens(f"r{i}") for i in range(4)]


def test_a_request_id_in_use_is_refused(parts: EngineParts) -> None:
    router, recorder = parts.engine(), Recorder()
    router.submit(request(parts), recorder)
    with pytest.raises(RequestError, match="'r' is in use"):
        router.submit(request(parts), recorder)
    router.step()
    with pytest.raises(RequestError, match="'r' is in use"):
        router.submit(request(parts), recorder)
    while router.busy:
        router.step()
    assert len(recorder.tokens("r")) == 8
    run(router, [request(parts)])  # free again


@pytest.mark.parametrize("when", ["in-the-inbox", "waiting", "prefilling", "decoding"])
def test_cancelling_ends_once_and_frees_the_pages(parts: EngineParts, when: str) -> None:
    router, recorder = parts.engine(settings=replace(SETTINGS, token_budget=16, max_running=1)), Recorder()
    if when == "waiting":
        router.submit(request(parts, "other", prompt=50), recorder)
    router.submit(request(parts, "gone", prompt=40), recorder)
    for _ in range({"in-the-inbox": 0, "waiting": 1, "prefilling": 2, "decoding": 4}[when]):
        router.step()
    router.cancel("gone")
    router.cancel("gone")
    while router.busy:
        router.step()
    end = recorder.end("gone")
    assert end == TokenOutput("gone", finish_reason="cancelled")
    assert bool(recorder.tokens("gone")) == (when == "decoding")
    assert router.pool.in_use == 0
    router.cancel("gone")  # after its end: left alone
    assert not router.step()
    assert router.stats().requests_cancelled == 1


@pytest.mark.parametrize("count", [0, 3, 500])
def test_logprobs_are_those_of_the_model(parts: EngineParts, count: int) -> None:
    config, opened = open_model(parts.checkpoint)
    slots = [(layer, e) for layer in config.moe_layers for e in range(config.n_routed_experts)]
    stored, _ = load_experts(opened, config, slots)
    experts: dict[int, Any] = {}
    for (layer, expert), weights in stored.items():
        experts.setdefault(layer, {})[expert] = mlp_weights(weights, Compute.on_cpu())
    # Temperature and filters choose the token; the probabilities reported are the model's own.
    wanted = request(parts, logprobs=count, temperature=0.7, top_k=5, seed=3)
    recorder = run(parts.engine(2), [wanted])
    tokens, entries = recorder.tokens("r"), recorder.logprobs("r")
    with torch.inference_mode():
        logits = reference_logits(config, parts.weights, experts, [*wanted.prompt_token_ids, *tokens])
    for index, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        expected = logits[len(wanted.prompt_token_ids) - 1 + index].log_softmax(-1)
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        top = expected.topk(min(count, config.vocab_size))
        assert entry.top_ids[:3] == top.indices.tolist()[:3]
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-3)


def test_one_call_a_step_and_front(parts: EngineParts) -> None:
    router, fronts = parts.engine(), [Recorder(), Recorder()]
    for i in range(6):
        router.submit(request(parts, f"r{i}", max_tokens=4), fronts[i % 2])
    while router.busy:
        router.step()
    assert [front.calls for front in fronts] == [4, 4]
    assert [sorted(front.outputs) for front in fronts] == [["r0", "r2", "r4"], ["r1", "r3", "r5"]]


def test_counters(parts: EngineParts) -> None:
    router, recorder = parts.engine(settings=replace(SETTINGS, token_budget=16)), Recorder()
    for i, prompt in enumerate((20, 7, 5)):
        router.submit(request(parts, f"r{i}", prompt=prompt), recorder)
    assert router.stats().waiting == 3
    router.step()
    stats = router.stats()
    assert (stats.running, stats.waiting, stats.steps, stats.prompt_tokens) == (3, 0, 1, 16)
    assert stats.pages_free + stats.pages_cached + stats.pages_in_use == stats.pages_total
    router.cancel("r1")
    while router.busy:
        router.step()
    stats = router.stats()
    assert (stats.running, stats.waiting, stats.prompt_tokens, stats.generated_tokens) == (0, 0, 28, 16)
    assert (stats.requests_finished, stats.requests_cancelled, stats.requests_failed) == (2, 1, 0)
    assert (stats.unreachable_experts, stats.broken_links, stats.pages_in_use) == (0, [], 0)


def test_preempted_prompts_are_not_counted_twice_as_answers(parts: EngineParts) -> None:
    router = parts.engine(settings=replace(SETTINGS, pages=16))
    run(router, [request(parts, f"r{i}", prompt=20, max_tokens=40) for i in range(4)])
    stats = router.stats()
    assert stats.preemptions > 0
    assert (stats.generated_tokens, stats.requests_finished) == (160, 4)


def started(router: Router) -> Router:
    router.start()
    return router


def test_threads_may_submit_and_cancel_while_it_runs(parts: EngineParts) -> None:
    router, recorder = started(parts.engine(2, "shm")), Recorder()

    def front(number: int) -> None:
        for i in range(8):
            router.submit(request(parts, f"{number}-{i}", prompt=1 + 5 * i), recorder)
            if i % 3 == 2:
                router.cancel(f"{number}-{i - 1}")

    threads = [threading.Thread(target=front, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.wait(*(f"{number}-{i}" for number in range(4) for i in range(8)))
    router.stop()
    assert router.pool.in_use == 0
    stats = router.stats()
    assert stats.requests_finished + stats.requests_cancelled == 32
    assert stats.requests_failed == 0


@pytest.mark.parametrize("threaded", [True, False])
def test_stopping_fails_what_is_left_and_takes_nothing_more(parts: EngineParts, threaded: bool) -> None:
    router, recorder = parts.engine(settings=replace(SETTINGS, max_running=1)), Recorder()
    if threaded:
        router.start()
    for i in range(3):
        router.submit(request(parts, f"r{i}", max_tokens=120), recorder)
    if threaded:
        recorder.wait("r0", tokens=2)
    else:
        router.step()
    router.stop()
    router.stop()
    for i in range(3):
        end = recorder.end(f"r{i}")
        assert end is not None
        assert (end.finish_reason, end.error) == ("error", "the router is shutting down")
    with pytest.raises(RouterLostError, match="shutting down"):
        router.submit(request(parts, "late"), recorder)
    assert router.pool.in_use == 0
    assert not router.busy


def test_a_broken_step_loop_fails_everything_and_says_so(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    router, recorder, failed = parts.engine(), Recorder(), threading.Event()

    def explode(_: object) -> None:
        raise ArithmeticError("the model is broken")

    monkeypatch.setattr(router.model, "sampled_states", explode)
    router.start(on_failure=failed.set)
    router.submit(request(parts), recorder)
    recorder.wait("r")
    assert failed.wait(10)
    end = recorder.end("r")
    assert end is not None
    assert end.error == "router-0 failed: ArithmeticError: the model is broken"
    with pytest.raises(RouterLostError, match="the model is broken"):
        router.submit(request(parts, "late"), recorder)


def test_an_idle_router_notices_a_lost_host(parts: EngineParts) -> None:
    router = started(parts.engine(2, "shm"))
    (host,) = [part for part in parts.opened if getattr(part, "host_id", "") == "expert-host-1"]
    assert router.stats().unreachable_experts == 0
    host.stop()
    give_up = time.monotonic() + 20
    while router.stats().unreachable_experts == 0 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert router.stats().unreachable_experts == 8, "half of two layers' eight experts"
    assert "expert-host-1" in router.stats().broken_links[0]


def test_links_that_come_too_late_are_closed(parts: EngineParts) -> None:
    router = parts.engine()
    late = [ScriptedHost("expert-host-0", router.dispatch.table, Clock()) for _ in range(4)]
    router.set_link("expert-host-0", late[0])
    router.adopt(parts.table(1, epoch=2), {"expert-host-0": late[1]})
    router.stop()  # before there was a step to take them in
    router.set_link("expert-host-0", late[2])
    router.adopt(parts.table(1, epoch=3), {"expert-host-0": late[3]})
    assert [link.closed for link in late] == [True] * 4
