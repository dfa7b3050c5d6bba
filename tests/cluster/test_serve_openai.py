"""The official client, unmodified, against the endpoint that Ray Serve serves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from .serve_process import KEY, Serve, eventually

pytestmark = pytest.mark.ray

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "What is 2 + 3?"}]


def connect(serve: Serve, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serve.url}/v1", api_key=key, max_retries=0, timeout=120.0)


@pytest.fixture
def client(shm_server: Serve) -> Iterator[openai.OpenAI]:
    with connect(shm_server, "unused") as client:
        yield client


@pytest.fixture
def narrow(gloo_server: Serve) -> Iterator[openai.OpenAI]:
    """Of the server with a key, small bodies and a short queue."""
    with connect(gloo_server, KEY) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny-r1"
    assert client.models.retrieve("tiny-r1").id == "tiny-r1"


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny-r1", messages=MESSAGES, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    stream = client.chat.completions.create(
        model="tiny-r1",
        messages=MESSAGES,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)

    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    reasoning = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices)
    message = whole.choices[0].message
    assert (content or None, reasoning or None) == (
        message.content or None,
        getattr(message, "reasoning_content", None) or None,
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    told = chunks[-1].usage
    assert told is not None
    assert whole.usage is not None
    assert (told.prompt_tokens, told.completion_tokens) == (whole.usage.prompt_tokens, 40)
    assert whole.usage.completion_tokens == 40
    assert told.prompt_tokens_details is not None
    assert told.prompt_tokens_details.cached_tokens == (told.prompt_tokens - 1) // 32 * 32, (
        "the full pages of the prompt"
    )


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny-r1", prompt="2 + 3 =", max_tokens=30, temperature=0)
    chunks = list(
        client.completions.create(model="tiny-r1", prompt="2 + 3 =", max_tokens=30, temperature=0, stream=True)
    )

    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_tokens_arrive_while_others_are_still_made(client: openai.OpenAI, shm_server: Serve) -> None:
    """Every chunk is sent at once: the router is still busy with a stream whose first token is here."""
    before = shm_server.status()["routers"][0]["generated_tokens"]
    stream = client.completions.create(
        model="tiny-r1",
        prompt="Count:",
        max_tokens=300,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    first = time.monotonic()
    made = shm_server.status()["routers"][0]["generated_tokens"] - before
    later = sum(1 for _ in stream)
    assert made < 300
    assert later > 100
    assert time.monotonic() - first > 0.1


def test_a_request_that_cannot_be_read_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"temperature"):
        client.chat.completions.create(model="tiny-r1", messages=MESSAGES, temperature=-1)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"other.*tiny-r1") as caught:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


def test_a_prompt_beyond_the_context_names_both_lengths(client: openai.OpenAI) -> None:
    context = client.models.retrieve("tiny-r1").model_dump()["max_model_len"]
    with pytest.raises(
        openai.BadRequestError, match=rf"{context + 5}\D.*{context}\D|{context}\D.*{context + 5}\D"
    ) as caught:
        client.completions.create(model="tiny-r1", prompt=[100] * (context + 5), max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_a_body_beyond_the_limit_is_refused(narrow: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match=r"20000") as caught:
        narrow.completions.create(model="tiny-r1", prompt="x" * 20001, max_tokens=1)
    assert caught.value.status_code == 413


def test_only_holders_of_a_key_get_in(gloo_server: Serve) -> None:
    with connect(gloo_server, "sk-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with httpx.Client(trust_env=False, timeout=60.0) as anybody:
        assert anybody.get(f"{gloo_server.url}/health").status_code == 200
        assert anybody.get(f"{gloo_server.url}/v1/moray/status").status_code == 401


def test_a_full_queue_says_when_to_come_back(narrow: openai.OpenAI, gloo_server: Serve) -> None:
    """16 may run and 20 wait there: of 60 that come at once the rest is refused, and those that are taken all end."""

    waits: list[float] = []

    def ask(_: int) -> str:
        try:
            answer = narrow.completions.create(
                model="tiny-r1", prompt=[100] * 8, max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            waits.append(float(error.response.headers["retry-after"]))
            return str(error.code)
        return str(answer.choices[0].finish_reason)

    with ThreadPoolExecutor(60) as threads:
        fates = list(threads.map(ask, range(60)))
    assert min(waits) >= 1
    assert set(fates) == {"length", "queue_full"}
    assert 20 <= fates.count("length") < 60
    eventually(lambda: gloo_server.status(key=KEY)["routers"][0]["pages_in_use"] == 0, "all pages are free")


def test_a_stream_whose_client_hangs_up_frees_its_pages(client: openai.OpenAI, shm_server: Serve) -> None:
    before = shm_server.status()["routers"][0]["requests_cancelled"]
    stream = client.chat.completions.create(
        model="tiny-r1", messages=MESSAGES, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(3), stream, strict=False):
        pass
    assert shm_server.status()["routers"][0]["pages_in_use"] > 0
    stream.close()
    router = eventually(
        lambda: (r := shm_server.status()["routers"][0])["pages_in_use"] == 0 and r, "the stream's pages are free"
    )
    assert router["requests_cancelled"] == before + 1
