"""A front over a scripted engine, called in-process or through uvicorn on a loopback port."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from moray.actors.front.app import create_app
from moray.actors.front.served_model import SamplingDefaults, ServedModel
from moray.actors.front.settings import FrontSettings
from moray.actors.front.testing import ScriptedEngine, Step, write_toy_tokenizer
from moray.model.tokenizer import Tokenizer

CONTEXT = 400


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("toy")
    write_toy_tokenizer(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> ServedModel:
    assert tokenizer.eos_token_id is not None
    return ServedModel(
        name="toy-r1",
        tokenizer=tokenizer,
        max_context=CONTEXT,
        vocab_size=512,
        eos_token_ids=(tokenizer.eos_token_id,),
        defaults=SamplingDefaults(temperature=0.6, top_p=0.95),
        created=1_700_000_000,
    )


@dataclass
class Front:
    """One app and the engine behind it."""

    app: FastAPI
    engine: ScriptedEngine
    tokenizer: Tokenizer

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request through the ASGI transport, in an event loop of its own."""

        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": "toy-r1", "messages": [{"role": "user", "content": content}], **fields}
        return self.request("POST", "/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return self.request("POST", "/v1/completions", json={"model": "toy-r1", "prompt": prompt, **fields})


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, in order; the string "[DONE]" as itself."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@pytest.fixture
def sse() -> Callable[[httpx.Response], list[Any]]:
    return events


MakeFront = Callable[..., Front]


@pytest.fixture
def make_front(model: ServedModel, tokenizer: Tokenizer) -> MakeFront:
    """`make_front(script, settings=..., model=...)`; a script may be a text, which the model answers token by token."""

    def make(
        script: str | Sequence[Step] | Callable[..., Sequence[Step]] = "answer",
        *,
        settings: FrontSettings | None = None,
        model: ServedModel = model,
    ) -> Front:
        if isinstance(script, str):
            steps: Sequence[Step] = [[t] for t in tokenizer.encode(script, add_special_tokens=False)]
            steps = [*steps, list(model.eos_token_ids)]
            engine = ScriptedEngine(lambda _: steps)
        elif callable(script):
            engine = ScriptedEngine(script)
        else:
            fixed = script
            engine = ScriptedEngine(lambda _: fixed)
        return Front(create_app(engine, model, settings), engine, tokenizer)

    return make


@asynccontextmanager
async def serving(app: FastAPI, http: Literal["auto", "h11", "httptools"] = "auto") -> AsyncIterator[str]:
    """Run the app under uvicorn on an ephemeral loopback port, in this event loop; yields the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=http, timeout_graceful_shutdown=5))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                await task
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.fixture
def serve() -> Callable[..., Any]:
    return serving


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    return eventually
