"""A server that is measured: what it serves, what it understands, and one request to it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...configs.errors import ClusterError
from .connection import Address, BrokenAnswerError, ClosedBetweenError, Connection, Head
from .stream import NO_TOKEN, OK, Answer, ErrorReader, StreamReader
from .workload import CHARACTERS_PER_TOKEN, FIRST_ID, Ask, PromptForm, made_up_text

PROBE_TIMEOUT_S = 120.0
"""For each question before the measurement: the first one of a server may compile something."""

KEPT_S = 2.0
"""A connection idle for longer is not used again: a server may close it just then (uvicorn does after 5 s)."""

_EXTENSIONS: dict[str, Any] = {
    "ignore_eos": True,
    "return_token_ids": True,
    "stream_options": {"include_usage": True},
}
"""Fields beyond OpenAI's first ones, each sent only to servers that take it."""

_SAMPLE_TOKENS = 200
"""About so long is the text from which a server's characters a token are found."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go, and in which form.

    Attributes:
        name: for tables.
        address: of its API.
        model: what it is asked for.
        key: bearer key, if it wants one.
        chat: ask /v1/chat/completions.
        temperature: of the answers.
        fields: those of `_EXTENSIONS` that it takes.
        form: of made-up prompts.
        characters_per_token: of made-up text, by its own count.
    """

    name: str
    address: Address
    model: str = ""
    key: str | None = field(default=None, repr=False)
    chat: bool = False
    temperature: float = 0.0
    fields: tuple[str, ...] = tuple(_EXTENSIONS)
    form: PromptForm = "ids"
    characters_per_token: float = CHARACTERS_PER_TOKEN

    def request(self, ask: Ask) -> bytes:
        """The whole request on the wire."""
        body: dict[str, Any] = {"model": self.model, "stream": True, "temperature": self.temperature}
        body["max_tokens"] = ask.output_tokens
        if self.chat:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        body |= {name: _EXTENSIONS[name] for name in self.fields}
        return self._http("POST", "/v1/chat/completions" if self.chat else "/v1/completions", body)

    def get(self, path: str) -> bytes:
        """A request for what is at `path`."""
        return self._http("GET", path, None)

    def _http(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        lines = [f"{method} {self.address.base}{path} HTTP/1.1", f"Host: {host}:{self.address.port}"]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data


class Connections:
    """Connections to one server, used again while they last."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Connection] = []

    async def request(self, data: bytes, on_body: Callable[[Head, bytes, float], None]) -> Head:
        """Send a request over one that is free, and wait for the end of its answer.

        Once more over a new one, where the server had closed a free one without saying so: it may, and to ask it twice does no
        harm. What a new connection does not answer is broken.

        Args:
            data: the whole request.
            on_body: is given the body as it comes, with the answer's head before it, and when it was read.

        Raises:
            BrokenAnswerError: the connection ended before the answer did, or what came is not HTTP.
            OSError: the server cannot be reached.
        """
        connection = await self.take()
        try:
            head = await _request(connection, data, on_body)
        except ClosedBetweenError:
            connection = await Connection.connect(self._address)
            head = await _request(connection, data, on_body)
        self.give_back(connection)
        return head

    async def take(self) -> Connection:
        """One that is free; a new one if none is.

        Raises:
            OSError: the server cannot be reached.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.perf_counter() - connection.idle_since < KEPT_S:
                return connection
            connection.close()
        return await Connection.connect(self._address)

    def give_back(self, connection: Connection) -> None:
        """It is free again."""
        if connection.reusable:
            self._idle.append(connection)

    def close(self) -> None:
        """End all that are free."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


async def _request(connection: Connection, data: bytes, on_body: Callable[[Head, bytes, float], None]) -> Head:
    def body(piece: bytes, at: float) -> None:
        assert connection.head is not None
        on_body(connection.head, piece, at)

    return await connection.request(data, body)


async def send(
    server: Server, connections: Connections, ask: Ask, *, timeout_s: float, answer: Answer | None = None
) -> Answer:
    """Send one request and read its answer; whatever goes wrong is in the answer.

    Args:
        server, ask: what is sent where.
        connections: to that server.
        timeout_s: for the whole of it, connecting included.
        answer: what to fill in, for whoever watches it grow.
    """
    answer = answer or Answer.to(ask.prompt_tokens, ask.output_tokens)
    reader, errors = StreamReader(answer), ErrorReader()

    def body(head: Head, piece: bytes, at: float) -> None:
        (reader if head.status == 200 else errors).feed(piece, at)

    try:
        async with asyncio.timeout(timeout_s):
            head = await connections.request(server.request(ask), body)
    except TimeoutError:
        problem, detail = "timed out", f"not answered within {timeout_s:g} s"
    except BrokenAnswerError as error:
        problem, detail = "broken connection", str(error)
    except OSError as error:
        problem, detail = "no connection", str(error)
    else:
        reader.finish(time.perf_counter())
        if head.status == 200:
            return answer
        problem, detail = f"HTTP {head.status}", errors.message
        answer.retry_after_s = _seconds(head.headers.get("retry-after"))
    if answer.times:
        reader.finish(time.perf_counter())  # what had come counts as tokens all the same
    answer.outcome, answer.detail, answer.ended = problem, detail, time.perf_counter()
    return answer


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0  # a date


async def probed(server: Server, *, form: PromptForm | None) -> Server:
    """Ask the server what it serves, which fields and prompts it takes, and how it counts text.

    Args:
        server: `model` may be empty: then its first one is taken.
        form: of prompts; None takes ids if the server does.

    Raises:
        ClusterError: it cannot be reached, or refuses even a plain request.
    """
    connections = Connections(server.address)
    try:
        if not server.model:
            server = replace(server, model=await _first_model(server, connections))
        forms: list[PromptForm] = ["text"] if server.chat else ["ids", "text"] if form is None else [form]
        for each in forms:
            ask = Ask([FIRST_ID, FIRST_ID + 1] if each == "ids" else "so be it", 2, 2)
            candidate, refusal = await _accepted(replace(server, form=each), connections, ask)
            if refusal is None:
                return await _counting(candidate, connections) if each == "text" else candidate
        assert refusal is not None
        raise ClusterError(
            f"{server.name} at {server.address} does not answer a plain request: {refusal.outcome}: {refusal.detail}"
        )
    finally:
        connections.close()


async def _accepted(server: Server, connections: Connections, ask: Ask) -> tuple[Server, Answer | None]:
    """The server with the fields it takes; with its answer to a request without any, if that fails too."""

    async def refusal(*fields: str) -> Answer | None:
        answer = await send(replace(server, fields=fields), connections, ask, timeout_s=PROBE_TIMEOUT_S)
        return None if answer.outcome in (OK, NO_TOKEN) else answer

    if await refusal(*_EXTENSIONS) is None:
        return server, None
    if (answer := await refusal()) is not None:
        return server, answer
    taken = [name for name in _EXTENSIONS if await refusal(name) is None]
    return replace(server, fields=tuple(taken)), None


async def _counting(server: Server, connections: Connections) -> Server:
    """The server with its own characters a token, where it counts tokens at all."""
    if "stream_options" not in server.fields:
        return server
    texts = [made_up_text(n * _SAMPLE_TOKENS, CHARACTERS_PER_TOKEN, np.random.default_rng(n)) for n in (1, 2)]
    answers = [await send(server, connections, Ask(text, 0, 1), timeout_s=PROBE_TIMEOUT_S) for text in texts]
    # The difference of two: a chat template's own tokens fall out.
    tokens = answers[1].prompt_tokens - answers[0].prompt_tokens
    if tokens <= 0:
        return server
    return replace(server, characters_per_token=(len(texts[1]) - len(texts[0])) / tokens)


async def _first_model(server: Server, connections: Connections) -> str:
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            head = await connections.request(server.get("/v1/models"), lambda _, piece, __: pieces.append(piece))
        found = json.loads(b"".join(pieces))
        if head.status != 200:
            raise ClusterError(f"{server.name}: {server.address}/v1/models answers {head.status}: {found}"[:300])
        return str(found["data"][0]["id"])
    except TimeoutError:
        raise ClusterError(f"{server.name}: {server.address} did not answer within {PROBE_TIMEOUT_S:g} s") from None
    except (OSError, BrokenAnswerError) as error:
        raise ClusterError(f"{server.name}: nothing answers at {server.address}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ClusterError(
            f"{server.name}: {server.address}/v1/models is not OpenAI's API ({error!r}); name its model with --model"
        ) from error
