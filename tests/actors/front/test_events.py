"""What is written for every token is written cheaply, and to the very bytes of the plain way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.actors.front.answer import AnswerDelta, joined
from moray.actors.front.chat import ChatFormat
from moray.actors.front.completions import CompletionFormat
from moray.actors.front.http_errors import text_to_json, to_json
from moray.actors.front.protocol import ChatRequest, CompletionRequest, RequestT, parse_request
from moray.actors.front.sse import AnswerFormat
from moray.model.tokenizer import ChatPrompt

TEXTS = st.text(max_size=12) | st.sampled_from(["\u2028", 'say "no"\\', "\x85\n\t\x00", "🙂", "data: [DONE]\n\n"])
REQUESTS: list[dict[str, Any]] = [
    {},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"return_token_ids": True},
    {"logprobs": True},
]


def parsed(kind: type[RequestT], **fields: Any) -> RequestT:
    return parse_request(kind, json.dumps({"model": "m", **fields}).encode())


@pytest.mark.parametrize("fields", REQUESTS, ids=lambda fields: "-".join(fields) or "plain")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deltas=st.lists(
        st.builds(
            AnswerDelta, TEXTS, TEXTS, st.just([5]), st.just([]), st.sampled_from([None, None, None, "stop", "length"])
        ),
        max_size=4,
    )
)
def test_events_of_a_chat(model: Any, fields: dict[str, Any], deltas: list[AnswerDelta]) -> None:
    request = parsed(ChatRequest, messages=[{"role": "user", "content": "x"}], **fields)
    form = ChatFormat(request, ChatPrompt("x", [5], False), model, "chatcmpl-1", 7)
    for delta in deltas:
        assert form.events(0, delta) == AnswerFormat.events(form, 0, delta)


@pytest.mark.parametrize("fields", [*REQUESTS[:3], {"logprobs": 2}], ids=lambda fields: "-".join(fields) or "plain")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deltas=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.builds(
                AnswerDelta, st.just(""), TEXTS, st.just([5]), st.just([]), st.sampled_from([None, None, "stop"])
            ),
        ),
        max_size=5,
    )
)
def test_events_of_completions(model: Any, fields: dict[str, Any], deltas: list[tuple[int, AnswerDelta]]) -> None:
    request = parsed(CompletionRequest, prompt=["x", "y"], **fields)
    form, plain = (CompletionFormat(request, [[5], [6]], model, "cmpl-1", 7) for _ in range(2))
    for index, delta in deltas:
        assert form.events(index, delta) == AnswerFormat.events(plain, index, delta)


@given(TEXTS)
def test_a_text_is_written_as_any_value(text: str) -> None:
    assert text_to_json(text) == to_json(text)


def test_deltas_that_were_not_taken_come_as_one() -> None:
    first = AnswerDelta("th", "", [1, 2])
    assert joined(first, AnswerDelta("ink", "so", [3], [], "stop")) == AnswerDelta("think", "so", [1, 2, 3], [], "stop")
