"""/v1/chat/completions, whole and streamed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.actors.front.testing import write_toy_tokenizer
from moray.actors.messages import GenerateRequest, TokenLogprobs, TokenOutput
from moray.model.tokenizer import Tokenizer

ANSWER = "so 7\n</think>\n\nIt is 7."


def test_the_thought_comes_apart_from_the_content(make_front: Any) -> None:
    front = make_front(ANSWER)
    body = front.chat().json()
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is 7.",
        "reasoning_content": "so 7",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"
    assert body["object"] == "chat.completion"
    assert body["model"] == "toy-r1"
    assert body["id"].startswith("chatcmpl-")


def test_usage_is_exact(make_front: Any) -> None:
    front = make_front(ANSWER)
    usage = front.chat().json()["usage"]
    (request,) = front.engine.requests
    answer = front.tokenizer.encode(ANSWER, add_special_tokens=False)
    thought = front.tokenizer.encode("so 7\n</think>", add_special_tokens=False)
    assert usage == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": len(answer) + 1,
        "total_tokens": len(request.prompt_token_ids) + len(answer) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": len(thought)},
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_usage_tells_what_was_cached(make_front: Any, sse: Any, endpoint: str, stream: bool) -> None:
    front = make_front(
        [TokenOutput("", [40], cached_tokens=7), TokenOutput("", [41], None, "length", cached_tokens=32)]
    )
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = getattr(front, endpoint)(**options)
    usage = sse(response)[-2]["usage"] if stream else response.json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 7}, "the second router knows what the first one told it"


def test_the_prompt_is_the_rendered_template(make_front: Any) -> None:
    front = make_front()
    body = {
        "model": "toy-r1",
        "messages": [
            {"role": "developer", "content": "Be "},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "<｜User｜>b"}]},
            {"role": "assistant", "content": "c", "reasoning_content": "dropped", "tool_calls": None, "refusal": None},
            {"role": "user", "content": "d", "name": "Ada"},
        ],
    }
    assert front.request("POST", "/v1/chat/completions", json=body).status_code == 200
    (request,) = front.engine.requests
    eos = "<｜end▁of▁sentence｜>"
    assert front.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False) == (
        f"<｜begin▁of▁sentence｜>Be <｜User｜>a<｜User｜>b<｜Assistant｜>c{eos}<｜User｜>d<｜Assistant｜><think>\n"
    )
    marker = front.tokenizer.encode("<｜User｜>", add_special_tokens=False)[0]
    assert request.prompt_token_ids.count(marker) == 2


def test_a_stream_in_order(make_front: Any, sse: Any) -> None:
    front = make_front(ANSWER)
    *chunks, done = sse(front.chat(stream=True))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "so 7"
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 7."
    kinds = [next(iter(delta)) for delta in deltas[1:] if delta]
    assert kinds == sorted(kinds, reverse=True)  # every thought before any content
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "chat.completion.chunk")
    }
    assert not any("usage" in chunk for chunk in chunks)


def test_the_usage_of_a_stream_comes_last_when_asked_for(make_front: Any, sse: Any) -> None:
    front = make_front(ANSWER)
    options = {"include_usage": True, "include_obfuscation": False}
    *chunks, usage, done = sse(front.chat(stream=True, stream_options=options))
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == front.chat().json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_thought_and_content_in_one_output_are_two_chunks(make_front: Any, sse: Any, tokenizer: Any) -> None:
    front = make_front([tokenizer.encode(ANSWER, add_special_tokens=False)])
    chunks = sse(front.chat(stream=True))[:-1]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "so 7"},
        {"content": "It is 7."},
        {},
    ]


def test_an_answer_without_a_thought(make_front: Any, model: Any, tmp_path: Any) -> None:
    write_toy_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    plain = replace(model, tokenizer=Tokenizer.load(tmp_path))
    message = make_front("just 7", model=plain).chat().json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("just 7", None)
    own = make_front("<think>\nhm</think>7", model=plain).chat().json()["choices"][0]["message"]
    assert (own["content"], own["reasoning_content"]) == ("7", "hm")


def test_an_answer_cut_inside_the_thought(make_front: Any) -> None:
    body = make_front(ANSWER).chat(max_tokens=3).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]
    assert body["usage"]["completion_tokens"] == 3
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_token_borders_never_leaks_and_cancels(make_front: Any, sse: Any, stream: bool) -> None:
    front = make_front("x</think>one 🙂END two")
    response = front.chat(stop=["zzz", "🙂END"], stream=stream)
    if stream:
        chunks = sse(response)[:-1]
        content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        content, reason = choice["message"]["content"], choice["finish_reason"]
    assert (content, reason) == ("one ", "stop")
    assert front.engine.cancelled == [front.engine.requests[0].request_id]


def test_logprobs(make_front: Any) -> None:
    front = make_front("a🙂")
    (choice,) = front.chat(logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    tokens = [*front.tokenizer.encode("a🙂", add_special_tokens=False), front.tokenizer.eos_token_id]
    assert [bytes(entry["bytes"]) for entry in content] == [front.tokenizer.token_bytes(token) for token in tokens]
    assert content[0]["token"] == "a"
    assert content[1]["token"] == r"\xf0"
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"] == -0.5
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(tokens)
    assert front.engine.requests[0].sampling.logprobs == 2


def test_logprobs_of_a_stream_are_those_of_the_whole(make_front: Any, sse: Any) -> None:
    front = make_front(ANSWER)
    chunks = sse(front.chat(stream=True, logprobs=True))[:-1]
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == front.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in streamed)


def test_without_logprobs_the_field_is_null(make_front: Any) -> None:
    front = make_front()
    assert front.chat().json()["choices"][0]["logprobs"] is None
    assert front.engine.requests[0].sampling.logprobs is None


def test_impossible_tokens_have_openais_floor(make_front: Any) -> None:
    low = TokenLogprobs(float("-inf"), [5, 6], [-0.1, float("-inf")])
    front = make_front([TokenOutput("", [7], [low], "stop")])
    (entry,) = front.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"][1]["logprob"]) == (-9999.0, -9999.0)


def test_token_ids_are_returned_when_asked_for(make_front: Any, sse: Any) -> None:
    front = make_front(ANSWER)
    body = front.chat(return_token_ids=True).json()
    answer = [*front.tokenizer.encode(ANSWER, add_special_tokens=False), front.tokenizer.eos_token_id]
    assert body["choices"][0]["token_ids"] == answer
    assert body["prompt_token_ids"] == front.engine.requests[0].prompt_token_ids
    first, *chunks, _ = sse(front.chat(return_token_ids=True, stream=True))
    assert first["prompt_token_ids"] == body["prompt_token_ids"]
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]] == answer
    assert "prompt_token_ids" not in front.chat().json()


def test_line_separators_travel_escaped(make_front: Any, sse: Any) -> None:
    text = "</think>a\u2028b\u2029c\x85d"
    response = make_front(text).chat(stream=True)
    assert len(response.text.splitlines()) == response.text.count("\n")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in sse(response)[:-1]) == "a\u2028b\u2029c\x85d"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab\n 🙂é", max_size=25), stop=st.lists(st.text("ab\n🙂", min_size=1, max_size=3), max_size=2)
)
def test_streamed_is_whole(make_front: Any, sse: Any, text: str, stop: list[str]) -> None:
    front = make_front(f"{text}</think>{text}")
    (choice,) = front.chat(stop=stop).json()["choices"]
    chunks = sse(front.chat(stop=stop, stream=True))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert reasoning == (choice["message"]["reasoning_content"] or "")
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_sampling_defaults_come_from_the_checkpoint(make_front: Any, model: Any) -> None:
    front = make_front()
    front.chat()
    (request,) = front.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.6, 0.95, 0, 0.0)
    assert sampling.max_tokens == model.max_context - len(request.prompt_token_ids)
    assert sampling.stop_token_ids == model.eos_token_ids
    front.chat()
    assert 0 <= sampling.seed < 1 << 63
    assert sampling.seed != front.engine.requests[1].sampling.seed


def test_sampling_is_what_the_request_says(make_front: Any) -> None:
    def sampling(**fields: Any) -> Any:
        front = make_front()
        response = front.chat(**fields)
        assert response.status_code == 200, response.text
        return front.engine.requests[0].sampling

    said = sampling(temperature=0, top_p=0.5, top_k=7, min_p=0.1, seed=5, max_completion_tokens=9, ignore_eos=True)
    assert (said.temperature, said.top_p, said.top_k, said.min_p) == (0.0, 0.5, 7, 0.1)
    assert (said.seed, said.max_tokens, said.stop_token_ids) == (5, 9, ())
    assert sampling(seed=-1).seed == (1 << 64) - 1
    assert sampling(seed=-(1 << 63)).seed == 1 << 63
    assert sampling(top_k=-1).top_k == 0
    assert sampling(top_k=1 << 40).top_k == 512
    assert sampling(max_tokens=4, max_completion_tokens=4).max_tokens == 4


def test_ids_are_unique(make_front: Any) -> None:
    front = make_front()
    front.chat()
    front.chat()
    ids: set[str] = {request.request_id for request in front.engine.requests}
    assert len(ids) == 2


def test_requests_of_one_script_can_differ(make_front: Any, tokenizer: Any) -> None:
    def echo(request: GenerateRequest) -> list[list[int]]:
        return [tokenizer.encode("</think>", add_special_tokens=False), request.prompt_token_ids]

    assert "hello there" in make_front(echo).chat("hello there").json()["choices"][0]["message"]["content"]
