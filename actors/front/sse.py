"""Answering a request over HTTP, whole or as a stream of server-sent events, for as long as the client is there.

Everything that holds the engine's resources lives inside `GenerationResponse.__call__`, so there is one place where
they are let go: when the answer is complete, when it fails, when the client hangs up (seen on `receive`), and when the
server cancels the request, which is how Ray Serve's proxy reports a client that hung up.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .answer import AnswerDelta
from .generation import Generation, cancel_and_wait
from .http_errors import CLIENT_CLOSED_REQUEST, JsonResponse, api_error_of, to_json
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
        started = False

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = True
            try:
                async with asyncio.timeout(self._settings.send_timeout_s):
                    await send(message)
            except OSError as error:
                # How servers of ASGI 2.4 and newer report a client that hung up; older ones drop what is sent. And a
                # `TimeoutError`, which is one too: a client that stays but does not read.
                raise ClientDisconnect from error

        work = self._send_stream(noting_send) if self._stream else self._send_whole(scope, receive, noting_send)
        try:
            finished = await run_while_connected(receive, work)
        except ClientDisconnect:
            finished = False
        if not finished and not started:
            # Nobody receives this; it tells the metrics and the access log what happened.
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas: list[list[AnswerDelta]] = [[] for _ in self._generation.runs]
        async with self._generation as generation:
            while not generation.finished:
                if (event := await generation.next(timeout_s=self._settings.keepalive_s)) is not None:
                    deltas[event[0]].append(event[1])
        await JsonResponse(self._form.whole(self._generation, deltas))(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with self._generation as generation:
            event = await generation.next(timeout_s=self._settings.stream_grace_s)
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            try:
                await write(b"".join(map(_event, self._form.opening())))
                while True:
                    data = _KEEPALIVE if event is None else b"".join(map(_event, self._form.chunks(*event)))
                    if data:
                        await write(data)
                    if generation.finished:
                        break
                    event = await generation.next(timeout_s=self._settings.keepalive_s)
                tail = b"".join(map(_event, self._form.closing(generation))) + _DONE
            except ClientDisconnect:
                raise
            except Exception as error:
                # The status is sent: the error travels as an event, and the stream ends without [DONE].
                tail = _event(api_error_of(error).body)
        await write(tail, more=False)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` until it ends or the client hangs up, in which case it is cancelled.

    Args:
        receive: the request's channel, its body already read.
        work: what to do.

    Returns:
        Whether `work` ended by itself; its exception, if any, is raised.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            await worker
            return True
        watcher.result()
        return False
    finally:
        await cancel_and_wait([task for task in (worker, watcher) if not task.done()])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {to_json(data)}\n\n".encode()
