"""Every refusal is OpenAI's error object, with the right status, naming the value and the way out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moray.actors.front.settings import FrontSettings
from moray.actors.front.testing import Pause
from moray.actors.messages import TokenOutput
from moray.configs.errors import ExpertsUnavailableError, QueueFullError, RouterLostError


def refused(
    response: Any, status: int, *says: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    for words in says:
        assert words in body["error"]["message"]
    if param is not None:
        assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": 2.5}, "2.5: must be at most 2"),
        ({"temperature": -0.1}, "-0.1: must be at least 0"),
        ({"temperature": "hot"}, '"hot": must be a number'),
        ({"temperature": True}, "true: must be a number"),
        ({"top_p": 0}, "0: must be above 0"),
        ({"top_p": 1.5}, "must be at most 1"),
        ({"min_p": -1}, "must be at least 0"),
        ({"min_p": 1.01}, "must be at most 1"),
        ({"top_k": -2}, "-2: must be at least -1"),
        ({"top_k": 1.5}, "1.5: must be an integer"),
        ({"max_tokens": 0}, "0: must be at least 1"),
        ({"max_tokens": "5"}, '"5": must be an integer'),
        ({"max_tokens": True}, "true: must be an integer"),
        ({"max_completion_tokens": -3}, "-3: must be at least 1"),
        ({"seed": 1 << 63}, "must be below 9223372036854775808"),
        ({"seed": 1.0}, "must be an integer"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"stop": [1]}, "must be a string or a list of strings"),
        ({"stop": ["x"] * 17}, "17 strings; at most 16"),
        ({"stop": "x" * 1025}, "1025 characters; at most 1024"),
        ({"stream": "yes"}, "must be true or false"),
        ({"ignore_eos": 1}, "must be true or false"),
        ({"return_token_ids": "no"}, "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "only allowed with stream = true"),
        ({"stream_options": 3, "stream": True}, "must be an object"),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_values_out_of_range(make_front: Any, endpoint: str, fields: dict[str, Any], says: str) -> None:
    front = make_front()
    refused(getattr(front, endpoint)(**fields), 400, says, param=next(iter(fields)))
    assert front.engine.requests == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -1),
        ("suffix", "x"),
        ("echo", True),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_unsupported_fields_are_refused_by_name(make_front: Any, endpoint: str, name: str, value: Any) -> None:
    response = getattr(make_front(), endpoint)(**{name: value})
    refused(response, 400, name, "not supported", param=name, code="unsupported_parameter")


@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_fields_that_change_nothing_are_taken(make_front: Any, endpoint: str) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "n": 1,
        "best_of": None,
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "echo": False,
        "modalities": ["text"],
        "reasoning_effort": None,
        "temperature": None,
        "stop": None,
        "seed": None,
        "stream": False,
        "stream_options": None,
        "max_tokens": None,
    }
    assert getattr(make_front(), endpoint)(**harmless).status_code == 200


@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_unknown_fields_are_refused_by_name(make_front: Any, endpoint: str) -> None:
    refused(getattr(make_front(), endpoint)(temprature=1), 400, "temprature", "temperature", code="unknown_parameter")


def test_fields_of_the_other_endpoint_are_unknown(make_front: Any) -> None:
    refused(make_front().complete(messages=[]), 400, "messages", code="unknown_parameter")
    refused(make_front().complete(top_logprobs=1), 400, "top_logprobs", code="unknown_parameter")
    refused(make_front().chat(prompt="x"), 400, "prompt", code="unknown_parameter")


def test_logprobs_out_of_range(make_front: Any) -> None:
    refused(make_front().chat(top_logprobs=2), 400, "needs logprobs", param="top_logprobs")
    refused(make_front().chat(logprobs=True, top_logprobs=21), 400, "at most 20", param="top_logprobs")
    refused(make_front().chat(logprobs=3), 400, "must be true or false", param="logprobs")
    refused(make_front().complete(logprobs=21), 400, "at most 20", param="logprobs")
    refused(make_front().complete(logprobs=True), 400, "must be an integer", param="logprobs")


def test_two_different_limits(make_front: Any) -> None:
    refused(make_front().chat(max_tokens=5, max_completion_tokens=6), 400, "5", "6", "differ", param="max_tokens")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "must be a list"),
        ([], "at least one message"),
        ("hi", "must be a list"),
        (["hi"], "messages[0]: must be an object"),
        ([{"role": "user"}], "messages[0].content: must be a string"),
        ([{"content": "x"}], "messages[0].role = None"),
        ([{"role": "robot", "content": "x"}], "messages[0].role = 'robot': must be one of assistant, developer"),
        ([{"role": "tool", "content": "x"}], "without tools"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "messages[1]"),
        ([{"role": "user", "content": "x", "image": 1}], "messages[0].image: no such field"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url': not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], "[0].text: must be a string"),
        ([{"role": "user", "content": ["x"]}], "text parts only"),
    ],
)
def test_messages_that_cannot_be_rendered(make_front: Any, messages: Any, says: str) -> None:
    response = make_front().request("POST", "/v1/chat/completions", json={"model": "toy-r1", "messages": messages})
    error = refused(response, 400, says)
    assert error["param"].startswith("messages")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "must be a text"),
        (7, "must be a text"),
        ([], "not empty"),
        ("", "prompt is empty"),
        (["a", ""], "prompt[1] is empty"),
        ([[]], "prompt[0] is empty"),
        ([[5], [5.5]], "prompt[1] = [5.5]"),
        ([5, "a"], "prompt[0] = 5"),
        ([True], "prompt[0] = true"),
        ([5, 512], "token id 512, but the model's ids are 0 to 511"),
        ([5, -1], "token id -1"),
        ([[5], [1 << 70]], f"token id {1 << 70}"),
        (["a"] * 257, "257 prompts; at most 256"),
    ],
)
def test_prompts_that_cannot_be_continued(make_front: Any, prompt: Any, says: str) -> None:
    refused(make_front().complete(prompt), 400, says, param="prompt")


def test_missing_fields(make_front: Any) -> None:
    front = make_front()
    refused(front.request("POST", "/v1/completions", json={"prompt": "x"}), 400, "model is missing", param="model")
    refused(front.request("POST", "/v1/chat/completions", json={"model": "toy-r1"}), 400, "messages is missing")
    refused(front.request("POST", "/v1/completions", json={"model": "toy-r1"}), 400, "prompt is missing")
    refused(front.request("POST", "/v1/completions", json={"model": 7, "prompt": "x"}), 400, "model = 7")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"model": "toy-r1",}',
        b'\xff{"a": 1}',
        b'{"model": "toy-r1", "prompt": "\\ud800"}',
        b'{"model": "toy-r1", "prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
    ],
    ids=["empty", "cut", "list", "null", "comma", "not UTF-8", "lone surrogate", "NaN", "deep"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bodies_that_are_not_json(make_front: Any, path: str, body: bytes) -> None:
    refused(make_front().request("POST", path, content=body), 400, "JSON", code="invalid_json")


def test_the_content_type_does_not_matter(make_front: Any) -> None:
    body = json.dumps({"model": "toy-r1", "prompt": "x"})
    response = make_front().request("POST", "/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 200


def test_another_model_is_not_found(make_front: Any) -> None:
    front = make_front()
    for path, extra in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        response = front.request("POST", path, json={"model": "gpt-9", **extra})
        refused(response, 404, "gpt-9", "toy-r1", param="model", code="model_not_found")
    refused(front.request("GET", "/v1/models/gpt-9"), 404, "gpt-9", code="model_not_found")


def test_unknown_paths_and_methods(make_front: Any) -> None:
    front = make_front()
    refused(front.request("POST", "/v1/embeddings", json={}), 404, "/v1/embeddings", code="unknown_endpoint")
    refused(front.request("GET", "/v1/models/"), 404)
    refused(front.request("GET", "/docs"), 404)
    response = front.request("GET", "/v1/chat/completions")
    refused(response, 405, "does not take GET", code="method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_prompt_over_the_context_names_both_numbers(make_front: Any) -> None:
    front = make_front()
    refused(front.complete([5] * 400), 400, "400 tokens", "holds 400", code="context_length_exceeded", param="prompt")
    refused(front.complete([5] * 450), 400, "450 tokens", "holds 400")
    refused(front.chat("🙂" * 200), 400, "holds 400", code="context_length_exceeded", param="messages")
    error = refused(front.complete([5] * 300, max_tokens=101), 400, "300", "101", "401", "400", "up to 100")
    assert error["param"] == "max_tokens"
    assert front.complete([5] * 300, max_tokens=100).status_code == 200
    refused(front.complete([[5], [5] * 400]), 400, "400 tokens")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "complete"])
def test_a_full_queue_says_when_to_come_back(make_front: Any, endpoint: str, stream: bool) -> None:
    front = make_front([QueueFullError("64 requests are waiting", retry_after_s=2.2)])
    response = getattr(front, endpoint)(stream=stream)
    error = refused(response, 429, "64 requests", code="queue_full")
    assert error["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_what_waited_for_too_long_is_a_429_as_well(make_front: Any, stream: bool) -> None:
    front = make_front([TokenOutput("", [], None, "error", "the request waited for 30 s", retry_after_s=11.5)])
    response = front.chat(stream=stream)
    refused(response, 429, "waited for 30 s", code="queue_full")
    assert response.headers["retry-after"] == "12"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ExpertsUnavailableError("layer 3, expert 7 has no replica"), "experts_unavailable"),
        (RouterLostError("no router can be reached"), "router_lost"),
    ],
)
def test_what_is_being_restored_is_a_503(make_front: Any, error: Exception, code: str, stream: bool) -> None:
    response = make_front([error]).chat(stream=stream)
    refused(response, 503, str(error), code=code)
    assert int(response.headers["retry-after"]) >= 1


def test_an_answer_that_fails_midway_is_not_an_answer(make_front: Any) -> None:
    front = make_front([[40], TokenOutput("", [], None, "error", "router-1 is gone")])
    refused(front.chat(), 500, "router-1 is gone", code="generation_failed")


@pytest.mark.parametrize("endpoint", ["chat", "complete"])
@pytest.mark.parametrize(
    "failure", [TokenOutput("", [], None, "error", "router-1 is gone"), ExpertsUnavailableError("router-1 is gone")]
)
def test_a_stream_that_fails_midway_ends_with_the_error(make_front: Any, sse: Any, endpoint: str, failure: Any) -> None:
    response = getattr(make_front([[40], failure]), endpoint)(stream=True)
    assert response.status_code == 200
    *chunks, error = sse(response)
    assert error["error"]["message"] == "router-1 is gone"
    assert error["error"]["type"] == "server_error"
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_failure_is_logged_and_not_told(make_front: Any, caplog: Any, stream: bool) -> None:
    front = make_front([RuntimeError("password is hunter2")])
    response = front.chat(stream=stream)
    error = refused(response, 500, "log", code="internal_error")
    assert "hunter2" not in error["message"]
    assert "hunter2" in caplog.text
    assert response.headers["x-request-id"]


def test_a_silent_engine_is_given_up(make_front: Any) -> None:
    front = make_front([[40], Pause(asyncio.Event())], settings=FrontSettings(stall_timeout_s=0.05))
    refused(front.chat(), 503, "nothing for 0.05 s")
    assert len(front.engine.cancelled) == 1


def test_an_engine_that_ends_without_a_reason_is_an_error(make_front: Any) -> None:
    front = make_front([])

    async def nothing(request: Any) -> Any:
        return
        yield

    front.engine.generate = nothing
    refused(front.chat(), 500, "without a reason")
