"""The front under a real server: the official client, too large bodies, silence, and many streams at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from moray.actors.front.settings import FrontSettings
from moray.actors.front.testing import Pause
from moray.actors.messages import GenerateRequest, TokenOutput
from moray.configs.errors import ExpertsUnavailableError, QueueFullError

ANSWER = "so 7\n</think>\n\nIt is 7 🙂."
HI: Any = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(url: str, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client:
        yield client


# --- the official client


def test_the_official_client_chats(make_front: Any, serve: Any) -> None:
    async def main() -> None:
        front = make_front(ANSWER)
        async with serve(front.app) as url, client_of(url) as client:
            answer = await client.chat.completions.create(
                model="toy-r1", messages=HI, logprobs=True, top_logprobs=1, extra_body={"top_k": 5, "min_p": 0.1}
            )
            message = answer.choices[0].message
            assert message.content == "It is 7 🙂."
            assert message.reasoning_content == "so 7"  # type: ignore[attr-defined]
            assert answer.usage is not None
            assert answer.usage.completion_tokens_details is not None
            assert answer.usage.completion_tokens_details.reasoning_tokens
            assert answer.choices[0].logprobs is not None
            assert front.engine.requests[0].sampling.top_k == 5
            # What came back can be sent again as it is.
            again: Any = [*HI, message, {"role": "user", "content": "sure?"}]
            assert (await client.chat.completions.create(model="toy-r1", messages=again)).choices[0].message.content

            stream = await client.chat.completions.create(
                model="toy-r1", messages=HI, stream=True, stream_options={"include_usage": True}, stop="IMPOSSIBLE"
            )
            chunks = [chunk async for chunk in stream]
            deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
            assert "".join(delta.content or "" for delta in deltas) == message.content
            assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "so 7"
            assert chunks[-1].usage == answer.usage
            assert chunks[-2].choices[0].finish_reason == "stop"

    asyncio.run(main())


def test_the_official_client_completes_and_lists(make_front: Any, serve: Any) -> None:
    async def main() -> None:
        async with serve(make_front("one two").app) as url, client_of(url) as client:
            answer = await client.completions.create(model="toy-r1", prompt=["a", "b"], logprobs=1)
            assert [choice.text for choice in answer.choices] == ["one two", "one two"]
            assert answer.choices[0].logprobs is not None
            assert answer.choices[0].logprobs.tokens
            stream = await client.completions.create(model="toy-r1", prompt=[5, 6], stream=True, max_tokens=50)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two"
            assert [model.id async for model in client.models.list()] == ["toy-r1"]
            assert (await client.models.retrieve("toy-r1")).owned_by == "moray"

    asyncio.run(main())


def test_the_official_synchronous_client_and_its_stream_helper(make_front: Any, serve: Any) -> None:
    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            with client.chat.completions.stream(model="toy-r1", messages=HI) as stream:
                final = stream.get_final_completion()
            assert final.choices[0].message.content == "It is 7 🙂."
            assert final.choices[0].finish_reason == "stop"

    async def main() -> None:
        async with serve(make_front(ANSWER).app) as url:
            await asyncio.to_thread(use, url)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_errors_map_to_the_official_clients_exceptions(make_front: Any, serve: Any, stream: bool) -> None:
    async def main() -> None:
        failures: dict[int, list[Any]] = {
            5: [QueueFullError("full", retry_after_s=7)],
            6: [ExpertsUnavailableError("no experts")],
            7: [RuntimeError("bug")],
        }

        def script(request: GenerateRequest) -> list[Any]:
            return failures.get(request.prompt_token_ids[0], [[9]])

        settings = FrontSettings(api_keys=("sk-1",), body_limit_bytes=4000)
        async with serve(make_front(script, settings=settings).app) as url:
            async with client_of(url, "sk-1") as client:

                async def ask(prompt: Any = "x", model: str = "toy-r1", **fields: Any) -> None:
                    answer: Any = await client.completions.create(model=model, prompt=prompt, stream=stream, **fields)
                    if stream:
                        async for _ in answer:
                            pass

                await ask()
                with pytest.raises(openai.BadRequestError, match="temperature") as bad:
                    await ask(temperature=3)
                assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
                assert bad.value.request_id
                with pytest.raises(openai.BadRequestError, match="best_of") as bad:
                    await ask(best_of=3)
                with pytest.raises(openai.BadRequestError) as bad:
                    await ask([5] * 400)
                assert bad.value.code == "context_length_exceeded"
                with pytest.raises(openai.NotFoundError) as missing:
                    await ask(model="gpt-9")
                assert missing.value.code == "model_not_found"
                with pytest.raises(openai.APIStatusError, match="4000 bytes") as large:
                    await ask("x" * 5000)
                assert large.value.status_code == 413
                with pytest.raises(openai.RateLimitError) as full:
                    await ask([5])
                assert full.value.response.headers["retry-after"] == "7"
                for prompt, status in (([6], 503), ([7], 500)):
                    with pytest.raises(openai.InternalServerError) as failed:
                        await ask(prompt)
                    assert failed.value.status_code == status
            async with client_of(url, "sk-2") as stranger:
                with pytest.raises(openai.AuthenticationError):
                    await stranger.models.list()

    asyncio.run(main())


def test_a_stream_that_fails_midway_raises_in_the_official_client(make_front: Any, serve: Any) -> None:
    async def main() -> None:
        front = make_front([[40], TokenOutput("", [], None, "error", "router-1 is gone")])
        async with serve(front.app) as url, client_of(url) as client:
            stream = await client.chat.completions.create(model="toy-r1", messages=HI, stream=True)
            with pytest.raises(openai.APIError, match="router-1 is gone"):
                async for _ in stream:
                    pass

    asyncio.run(main())


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_far_too_large_body_gets_its_answer_and_not_a_reset(
    make_front: Any, serve: Any, http: str, chunked: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 16)

    async def main() -> None:
        front = make_front(settings=FrontSettings(body_limit_bytes=1000, api_keys=("k",)))
        async with serve(front.app, http=http) as url, httpx.AsyncClient(base_url=url) as client:
            for key, status in (("k", 413), ("wrong", 401)):
                body: Any = pieces() if chunked else b" " * (4 << 20)
                headers = {"authorization": f"Bearer {key}"}
                response = await client.post("/v1/completions", content=body, headers=headers)
                assert response.status_code == status

    asyncio.run(main())


# --- silence, and many at once


def test_a_silent_stream_is_kept_open_with_comments(make_front: Any, serve: Any) -> None:
    async def main() -> None:
        before, between = asyncio.Event(), asyncio.Event()
        settings = FrontSettings(stream_grace_s=0.05, keepalive_s=0.05)
        front = make_front([Pause(before), [40], Pause(between), [41]], settings=settings)
        async with serve(front.app) as url, httpx.AsyncClient(base_url=url) as client:
            body = {"model": "toy-r1", "prompt": "x", "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                lines = response.aiter_lines()
                seen = []
                async for line in lines:
                    seen.append(line)
                    comments = seen.count(": keep-alive")
                    if comments == 2:
                        before.set()
                    if comments >= 4 and any(line.startswith("data") for line in seen):
                        between.set()
            data = [line for line in seen if line.startswith("data")]
            assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in data[:-1]) == front.tokenizer.decode(
                [40, 41]
            )
            assert data[-1] == "data: [DONE]"

    asyncio.run(main())


def test_the_official_client_reads_past_comments(make_front: Any, serve: Any) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        settings = FrontSettings(stream_grace_s=0.02, keepalive_s=0.02)
        front = make_front([Pause(gate), [40]], settings=settings)
        async with serve(front.app) as url, client_of(url) as client:
            stream = await client.completions.create(model="toy-r1", prompt="x", stream=True)
            asyncio.get_running_loop().call_later(0.2, gate.set)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == front.tokenizer.decode([40])

    asyncio.run(main())


def test_fifty_streams_at_once_do_not_mix(make_front: Any, serve: Any) -> None:
    async def main() -> None:
        started = asyncio.Event()
        front = make_front()

        def script(request: GenerateRequest) -> list[Any]:
            if len(front.engine.requests) == 50:
                started.set()  # all fifty are in flight before the first goes on
            text = front.tokenizer.decode(request.prompt_token_ids)
            own = f"thinking of {text}</think>this is {text}, 🙂" * 3
            ids = front.tokenizer.encode(own, add_special_tokens=False)
            return [Pause(started), *[[token_id] for token_id in ids]]

        front.engine.script = script
        async with serve(front.app) as url, client_of(url) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model="toy-r1", prompt=f"number {number}", stream=True, max_tokens=380
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            answers = await asyncio.gather(*(one(number) for number in range(50)))
        for number, answer in enumerate(answers):
            assert answer == f"thinking of number {number}</think>this is number {number}, 🙂" * 3
        assert len(front.engine.finished) == 50
        assert front.engine.cancelled == []

    asyncio.run(main())
