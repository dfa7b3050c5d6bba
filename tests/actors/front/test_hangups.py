"""Clients that hang up, stall or do not read: the engine is told, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from moray.actors.front.settings import FrontSettings
from moray.actors.front.testing import Pause
from moray.actors.messages import GenerateRequest, TokenOutput


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(make_front: Any, serve: Any, until: Any, stream: bool) -> None:
    async def main() -> None:
        never = asyncio.Event()
        front = make_front([[40], Pause(never)])
        async with serve(front.app) as url, httpx.AsyncClient(base_url=url) as client:
            body = {"model": "toy-r1", "prompt": [[5], [6]], "stream": stream}
            if stream:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    await anext(response.aiter_lines())
                    assert front.engine.cancelled == []
            else:
                task = asyncio.create_task(client.post("/v1/completions", json=body))
                await until(lambda: len(front.engine.requests) == 2)
                task.cancel()
                await asyncio.wait([task])
            await until(lambda: len(front.engine.cancelled) == 2)
            metrics = (await client.get("/metrics")).text
            assert 'moray_generations_total{front="front-0",reason="cancelled"} 2.0' in metrics
            assert 'endpoint="/v1/completions",front="front-0"} 0.0' in metrics  # none in flight
            assert (f'status="{200 if stream else 499}"') in metrics

    asyncio.run(main())


def asgi_request(path: str, body: Any, *, spec_version: str = "2.3") -> tuple[dict[str, Any], dict[str, Any]]:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("front", 80),
        "client": ("c", 1),
        "root_path": "",
    }
    return scope, {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_cancels_the_request_frees_its_pages(make_front: Any, until: Any, stream: bool) -> None:
    """Ray Serve's way to report a client that hung up."""

    async def main() -> None:
        front = make_front([[40], Pause(asyncio.Event())])
        scope, message = asgi_request("/v1/completions", {"model": "toy-r1", "prompt": "x", "stream": stream})
        messages = [message]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(_: Any) -> None:
            pass

        task = asyncio.create_task(front.app(scope, receive, send))
        await until(lambda: len(front.engine.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(front.engine.cancelled) == 1

    asyncio.run(main())


def test_a_server_that_raises_on_send_frees_its_pages(make_front: Any) -> None:
    """How servers of ASGI 2.4 report a client that hung up."""

    async def main() -> None:
        front = make_front([[40], [41], Pause(asyncio.Event())])
        body = {"model": "toy-r1", "prompt": "x", "stream": True}
        scope, message = asgi_request("/v1/completions", body, spec_version="2.4")
        messages = [message]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) == 3:
                raise OSError("connection lost")

        await asyncio.wait_for(front.app(scope, receive, send), 10)
        assert sent == ["http.response.start", "http.response.body", "http.response.body"]
        assert len(front.engine.cancelled) == 1

    asyncio.run(main())


def test_a_client_that_hangs_up_while_sending_its_body_starts_nothing(make_front: Any) -> None:
    async def main() -> None:
        front = make_front()
        scope, message = asgi_request("/v1/completions", {"model": "toy-r1", "prompt": "x"})
        messages = [{"type": "http.disconnect"}, {**message, "more_body": True}]

        async def receive() -> Any:
            return messages.pop()

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(front.app(scope, receive, send), 10)
        assert sent[0]["status"] == 499
        assert front.engine.requests == []

    asyncio.run(main())


def test_a_client_that_does_not_read_its_answer_is_given_up(make_front: Any) -> None:
    async def main() -> None:
        front = make_front([[40], [41], Pause(asyncio.Event())], settings=FrontSettings(send_timeout_s=0.05))
        scope, message = asgi_request("/v1/completions", {"model": "toy-r1", "prompt": "x", "stream": True})
        messages = [message]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await asyncio.wait_for(front.app(scope, receive, send), 10)
        assert len(front.engine.cancelled) == 1

    asyncio.run(main())


def test_a_body_that_does_not_come_is_given_up(make_front: Any) -> None:
    async def main() -> None:
        front = make_front(settings=FrontSettings(body_timeout_s=0.05))
        scope, _ = asgi_request("/v1/completions", {})

        async def receive() -> Any:
            await asyncio.Event().wait()

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(front.app(scope, receive, send), 10)
        assert sent[0]["status"] == 408
        assert b"0.05 s" in sent[1]["body"]

    asyncio.run(main())


@pytest.mark.parametrize("stop", [None, "B"])
def test_an_engine_may_take_its_time_to_let_go(make_front: Any, stop: str | None) -> None:
    """Telling a router that a request is over takes a message; the end of the answer must not cut it off."""

    async def main() -> None:
        front = make_front()
        let_go = []

        async def slow_to_close(request: GenerateRequest) -> Any:
            try:
                for letter in "ABC":
                    (token_id,) = front.tokenizer.encode(letter, add_special_tokens=False)
                    yield TokenOutput(request.request_id, [token_id], None, "length" if letter == "C" else None)
            finally:
                for _ in range(20):
                    await asyncio.sleep(0)
                let_go.append(request.request_id)

        front.engine.generate = slow_to_close
        transport = httpx.ASGITransport(front.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            body = {"model": "toy-r1", "prompt": ["x", "y"], "stop": stop}
            response = await client.post("/v1/completions", json=body)
        assert [choice["text"] for choice in response.json()["choices"]] == ["ABC" if stop is None else "A"] * 2
        assert len(let_go) == 2

    asyncio.run(main())
