"""Whatever a client sends is answered, or refused in OpenAI's words: never with a 500, and never for long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moray.actors.front.app import create_app
from moray.actors.front.served_model import SamplingDefaults, ServedModel
from moray.actors.front.settings import FrontSettings
from moray.actors.front.testing import ScriptedEngine, write_toy_tokenizer
from moray.model.tokenizer import Tokenizer

KEY = "sk-of-the-fuzz-test"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")

deterministic = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Front:
    """The application, called in one event loop."""

    def __init__(self, app: FastAPI, runner: asyncio.Runner) -> None:
        self._app = app
        self._runner = runner

    def send(self, method: str, path: str, *, key: str = KEY, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}

        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://front") as client:
                return await client.request(method, path, headers=headers, **options)

        return self._runner.run(go())


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    model = ServedModel(
        name="toy-r1",
        tokenizer=tokenizer,
        max_context=400,
        vocab_size=512,
        eos_token_ids=(0,),
        defaults=SamplingDefaults(temperature=0.6, top_p=0.95),
        created=1_700_000_000,
    )
    engine = ScriptedEngine(lambda _: [[5], [6]])
    app = create_app(engine, model, FrontSettings(api_keys=(KEY,), body_limit_bytes=1 << 20))
    with asyncio.Runner() as runner:
        yield Front(app, runner)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "stop",
        "seed",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "return_token_ids",
        "n",
        "tools",
        "logit_bias",
        "user",
        "nonsense",
    ]
)


def answered_or_refused(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404, 405, 413), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 5000, "what the client sent is not sent back to it whole"


@deterministic
@example("/v1/completions", b'{"model": "toy-r1", "prompt": ' + b"1" * 6000 + b"}")
@example("/v1/completions", b'{"model": "toy-r1", "prompt": [' + b"1" * 6000 + b"]}")
@example("/v1/completions", b'{"model": "toy-r1", "prompt": "x", "seed": ' + b"9" * 6000 + b"}")
@example("/v1/completions", b'{"model": "toy-r1", "prompt": "x", "user": ' + b"[" * 150 + b"]" * 150 + b"}")
@example("/v1/chat/completions", b'{"model": "toy-r1", "messages": [{"role": "user", "content": "\\u0000"}]}')
@example("/v1/chat/completions", b'{"model": "toy-r1", "messages": [{"role": "user", "content": ["x"]}]}')
@example("/v1/chat/completions", b'{"a": 1, "a": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}")
@given(st.sampled_from(ENDPOINTS), st.binary(max_size=200))
def test_any_body_is_answered_or_refused(front: Front, path: str, body: bytes) -> None:
    answered_or_refused(front.send("POST", path, content=body))


@deterministic
@given(st.sampled_from(ENDPOINTS), st.dictionaries(names, values, max_size=4))
def test_any_field_is_answered_or_refused(front: Front, path: str, fields: dict[str, Any]) -> None:
    good = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps({"model": "toy-r1", **good, **fields})
    answered_or_refused(front.send("POST", path, content=body.encode("utf-8", "surrogatepass")))


@deterministic
@given(st.sampled_from(["GET", "PUT", "HEAD", "POST"]), st.text(st.characters(codec="ascii"), max_size=30))
def test_any_path_is_answered_or_refused(front: Front, method: str, rest: str) -> None:
    response = front.send(method, "/v1/" + quote(rest, safe="/%?"))
    assert response.status_code in (200, 400, 404, 405), response.text


@deterministic
@example("Basic c2s=")
@example("Bearer")
@example(f"Bearer {KEY} ")
@example(f"Bearer {KEY}x")
@example(f"bearer\t{KEY}")
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_no_other_key_lets_anybody_in(front: Front, authorization: str) -> None:
    scheme, _, key = authorization.partition(" ")
    lets_in = scheme.lower() == "bearer" and key.strip() == KEY
    for path in ("/v1/models", "/metrics", "/v1/moray/status"):
        response = front.send("GET", path, headers={"authorization": authorization})
        assert (response.status_code == 200) == lets_in
        assert KEY not in response.text


@pytest.mark.parametrize("claims", ["2000000", "99999999999999999999", "-1", "1e9", "0x10", "١٢"])
def test_a_length_that_is_claimed_is_not_believed(front: Front, claims: str) -> None:
    """A large one is refused before anything is read; what is no number is left to the server in front."""
    headers = {"content-length": claims.encode("utf-8")}
    response = front.send("POST", "/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == (413 if len(claims) > 6 else 400)
