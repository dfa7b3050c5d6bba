"""Answering a request over HTTP, whole or as a stream of server-sent events, for as long as the client is there.

Everything that holds the engine's resources lives inside `GenerationResponse.__call__`, so there is one place where
they are let go: when the answer is complete, when it fails, when the client hangs up (seen on `receive`), and when the
server cancels the request, which is how Ray Serve's proxy reports a client that hung up.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .answer import AnswerDelta
from .generation import Generation, cancel_and_wait
from .http_errors import CLIENT_CLOSED_REQUEST, JsonResponse, api_error_of, text_to_json, to_json
from .patience import Patience
from .settings import FrontSettings

_DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": keep-alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events into blocks
)


class AnswerFormat(ABC):
    """How one endpoint writes answers."""

    @abstractmethod
    def opening(self) -> Iterable[dict[str, Any]]:
        """Chunks before the first token."""

    @abstractmethod
    def chunks(self, index: int, delta: AnswerDelta) -> Iterable[dict[str, Any]]:
        """Chunks for one delta of one choice; may be none."""

    @abstractmethod
    def closing(self, generation: Generation) -> Iterable[dict[str, Any]]:
        """Chunks after the last token."""

    @abstractmethod
    def whole(self, generation: Generation, deltas: list[list[AnswerDelta]]) -> dict[str, Any]:
        """The answer that is not streamed; `deltas` by choice."""

    def events(self, index: int, delta: AnswerDelta) -> bytes:
        """`chunks` as they are sent. For every token: formats overwrite it with something cheaper to the same bytes."""
        return b"".join(map(event, self.chunks(index, delta)))


def event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {to_json(chunk)}\n\n".encode()


class TextEvent:
    """Events that are alike but for one text: the rest is written once.

    Args:
        chunk_with: the chunk with the text that it is given.
    """

    def __init__(self, chunk_with: Callable[[str], dict[str, Any]]) -> None:
        mark = uuid.uuid4().hex  # as no other part of the chunk has it
        self._before, self._after = event(chunk_with(mark)).split(f'"{mark}"'.encode())

    def __call__(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + text_to_json(text).encode() + self._after


class GenerationResponse(Response):
    """Runs a generation and sends what it writes. Errors before the first byte are raised, for their own status."""

    def __init__(self, generation: Generation, form: AnswerFormat, settings: FrontSettings, *, stream: bool) -> None:
        super().__init__()
        self._generation = generation
        self._form = form
        self._settings = settings
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        client = _Client(send, self._opening, self._settings)
        work = self._send_stream(client) if self._stream else self._send_whole(client, scope, receive)
        beside = [client.keep_open()] if self._stream else []
        try:
            finished = await run_while_connected(receive, work, *beside)
        except ClientDisconnect:
            finished = False
        if not finished and not client.started:
            # Nobody receives this; it tells the metrics and the access log what happened.
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)

    def _opening(self) -> bytes:
        return b"".join(map(event, self._form.opening()))

    async def _send_whole(self, client: _Client, scope: Scope, receive: Receive) -> None:
        deltas: list[list[AnswerDelta]] = [[] for _ in self._generation.runs]
        async with Patience() as patience, aclosing(self._generation.deltas(patience)) as arriving:
            async for index, delta in arriving:
                deltas[index].append(delta)
        async with client.in_time():
            await JsonResponse(self._form.whole(self._generation, deltas))(scope, receive, client.send)

    async def _send_stream(self, client: _Client) -> None:
        form, send_timeout_s = self._form, self._settings.send_timeout_s
        unfinished = len(self._generation.runs)
        try:
            async with Patience() as patience, aclosing(self._generation.deltas(patience)) as deltas:
                async for index, delta in deltas:
                    data = form.events(index, delta)
                    unfinished -= delta.finish_reason is not None
                    if not unfinished:
                        data += b"".join(map(event, form.closing(self._generation))) + _DONE
                    if data or not client.started:
                        patience.give(send_timeout_s, ClientDisconnect)
                        await client.write(data, more=bool(unfinished))
        except ClientDisconnect:
            raise
        except Exception as error:
            if not client.started:
                raise
            # The status is sent: the error travels as an event, and the stream ends without [DONE].
            async with client.in_time():
                await client.write(event(api_error_of(error).body), more=False)


class _Client:
    """Whoever asked: takes one answer.

    Two tasks write a streamed one: that of the answer, and `keep_open` while there is nothing of it to write.

    Attributes:
        started: the status is sent.
    """

    def __init__(self, send: Send, opening: Callable[[], bytes], settings: FrontSettings) -> None:
        self.started = False
        self._send = send
        self._opening = opening
        self._settings = settings
        self._writing = asyncio.Lock()
        self._ended = False
        self._wrote_at = 0.0

    async def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            ClientDisconnect: the client has hung up.
        """
        self.started = True
        try:
            await self._send(message)
        except OSError as error:
            # How servers of ASGI 2.4 and newer report it; older ones drop what is sent.
            raise ClientDisconnect from error

    async def write(self, data: bytes, *, more: bool) -> None:
        """Send more of a stream, or the last of it; it begins with the first.

        Raises:
            ClientDisconnect: the client has hung up.
        """
        async with self._writing:
            if self._ended:
                return  # while this waited for its turn
            self._ended = not more
            if not self.started:
                await self.send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                data = self._opening() + data
            await self.send({"type": "http.response.body", "body": data, "more_body": more})
            self._wrote_at = time.monotonic()

    async def keep_open(self) -> None:
        """Begin the stream before it has something to say if that takes long, and never let it be silent for long.

        Raises:
            ClientDisconnect: the client has hung up, or does not read.
        """
        await asyncio.sleep(self._settings.stream_grace_s)
        while not self._ended:
            silent_s = time.monotonic() - self._wrote_at
            if not self.started or silent_s >= self._settings.keepalive_s:
                async with self.in_time():
                    await self.write(_KEEPALIVE, more=True)
            else:
                await asyncio.sleep(self._settings.keepalive_s - silent_s)

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """For what is sent once: a client that stays but does not read counts as gone.

        Raises:
            ClientDisconnect: what was sent inside was not taken.
        """
        try:
            async with asyncio.timeout(self._settings.send_timeout_s):
                yield
        except TimeoutError:
            raise ClientDisconnect from None


async def run_while_connected(
    receive: Receive, work: Coroutine[Any, Any, None], *beside: Coroutine[Any, Any, None]
) -> bool:
    """Run `work` until it ends or the client hangs up, in which case it is cancelled.

    Args:
        receive: the request's channel, its body already read.
        work: what to do.
        beside: what to do meanwhile; it ends with `work`, or ends it with its error.

    Returns:
        Whether `work` ended by itself; its exception, if any, is raised.
    """
    worker = asyncio.create_task(work)
    others = [asyncio.create_task(other) for other in (_disconnected(receive), *beside)]
    try:
        await asyncio.wait({worker, *others}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            await worker
            return True
        for other in others:
            if other.done():
                other.result()
        return False
    finally:
        await cancel_and_wait([task for task in (worker, *others) if not task.done()])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
