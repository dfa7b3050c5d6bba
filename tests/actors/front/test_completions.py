"""/v1/completions: raw prompts, several at once, and the older log-probability format."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moray.actors.front.settings import FrontSettings
from moray.actors.front.testing import Pause
from moray.actors.messages import GenerateRequest
from moray.configs.errors import QueueFullError


def test_a_text_prompt_is_continued_as_it_is(make_front: Any) -> None:
    front = make_front("<think>x</think> y")
    body = front.complete("say: ").json()
    assert body["choices"] == [{"index": 0, "text": "<think>x</think> y", "logprobs": None, "finish_reason": "stop"}]
    assert body["object"] == "text_completion"
    (request,) = front.engine.requests
    assert request.prompt_token_ids == front.tokenizer.encode("say: ")
    assert request.prompt_token_ids[0] == front.tokenizer.bos_token_id
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": len(front.tokenizer.encode("<think>x</think> y")),
        "total_tokens": len(request.prompt_token_ids) + len(front.tokenizer.encode("<think>x</think> y")),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_special_tokens_in_a_raw_prompt_count(make_front: Any) -> None:
    front = make_front()
    front.complete("<｜User｜>hi<｜Assistant｜>")
    assert len(front.engine.requests[0].prompt_token_ids) == 3 + len(
        front.tokenizer.encode("hi", add_special_tokens=False)
    )


def test_token_ids_are_taken_as_they_are(make_front: Any) -> None:
    front = make_front()
    assert front.complete([5, 6, 511]).status_code == 200
    assert front.engine.requests[0].prompt_token_ids == [5, 6, 511]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[5], [6], [7]], ["a", [6], "c"]])
def test_several_prompts_are_several_choices(make_front: Any, sse: Any, prompt: Any, stream: bool) -> None:
    def echo(request: GenerateRequest) -> list[list[int]]:
        return [request.prompt_token_ids[-1:], request.prompt_token_ids[-1:]]

    front = make_front(echo)
    response = front.complete(prompt, stream=stream, return_token_ids=True)
    asked = {request.request_id[-1]: request.prompt_token_ids for request in front.engine.requests}
    if stream:
        chunks = [chunk["choices"][0] for chunk in sse(response)[:-1]]
        for index in range(3):
            own = [chunk for chunk in chunks if chunk["index"] == index]
            assert own[0]["prompt_token_ids"] == asked[str(index)]
            assert [t for chunk in own for t in chunk["token_ids"]] == asked[str(index)][-1:] * 2
            assert [chunk["finish_reason"] for chunk in own][-1] == "stop"
    else:
        body = response.json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert [choice["prompt_token_ids"] for choice in body["choices"]] == [asked[str(n)] for n in range(3)]
        assert [choice["token_ids"] for choice in body["choices"]] == [asked[str(n)][-1:] * 2 for n in range(3)]
        assert body["usage"]["completion_tokens"] == 6
        assert body["usage"]["prompt_tokens"] == sum(map(len, asked.values()))


def test_several_prompts_run_side_by_side(make_front: Any) -> None:
    """Each waits for the other: run one after the other they would never end."""
    first, second = asyncio.Event(), asyncio.Event()

    class Set(Pause):
        """Sets one event, then waits for another."""

        def __init__(self, mine: asyncio.Event, others: asyncio.Event) -> None:
            object.__setattr__(self, "event", others)
            object.__setattr__(self, "mine", mine)

    def script(request: GenerateRequest) -> list[Any]:
        mine, others = (first, second) if request.prompt_token_ids == [5] else (second, first)
        mine.set()
        return [Pause(others), [9]]

    assert make_front(script).complete([[5], [6]]).status_code == 200


def test_one_refused_prompt_refuses_the_request_and_cancels_the_rest(make_front: Any) -> None:
    def script(request: GenerateRequest) -> list[Any]:
        if request.prompt_token_ids == [6]:
            return [QueueFullError("full", retry_after_s=2)]
        return [[9], Pause(asyncio.Event())]

    front = make_front(script)
    assert front.complete([[5], [6]]).status_code == 429
    assert len(front.engine.cancelled) == 1


def test_a_stream_and_its_usage(make_front: Any, sse: Any) -> None:
    front = make_front("one two")
    *chunks, usage, done = sse(front.complete(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two"
    assert usage["usage"] == front.complete().json()["usage"]
    assert usage["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)


def test_sixteen_tokens_unless_said_otherwise(make_front: Any, model: Any) -> None:
    front = make_front()
    front.complete([5])
    front.complete([5], max_tokens=20)
    front.complete([5] * (model.max_context - 3))
    assert [request.sampling.max_tokens for request in front.engine.requests] == [16, 20, 3]
    unbounded = make_front(settings=FrontSettings(completion_max_tokens=None))
    unbounded.complete([5])
    assert unbounded.engine.requests[0].sampling.max_tokens == model.max_context - 1


def test_logprobs_in_the_older_format(make_front: Any) -> None:
    front = make_front("ab 🙂")
    (choice,) = front.complete(logprobs=2).json()["choices"]
    tokens = [*front.tokenizer.encode("ab 🙂", add_special_tokens=False), front.tokenizer.eos_token_id]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(tokens)
    assert logprobs["tokens"][0] == "a"
    assert r"bytes:\xf0" in logprobs["tokens"]
    assert logprobs["token_logprobs"] == [-0.5] * len(tokens)
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert len(logprobs["top_logprobs"][0]) == 2
    assert logprobs["top_logprobs"][0]["a"] == -0.5


def test_logprobs_zero_reports_the_chosen_token_alone(make_front: Any) -> None:
    (choice,) = make_front("a").complete(logprobs=0).json()["choices"]
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5}


def test_logprobs_of_a_stream_are_those_of_the_whole(make_front: Any, sse: Any) -> None:
    front = make_front("ab 🙂 STOP c")
    (choice,) = front.complete(logprobs=1, stop="STOP").json()["choices"]
    chunks = sse(front.complete(logprobs=1, stop="STOP", stream=True))[:-1]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [item for c in chunks for item in (c["choices"][0]["logprobs"] or {key: []})[key]]
        assert streamed == choice["logprobs"][key]
    assert "STOP" not in "".join(choice["logprobs"]["tokens"])
