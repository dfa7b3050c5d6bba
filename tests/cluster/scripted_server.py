"""An HTTP server that answers as a test says: pieces of an answer, pauses, refusals, connections that end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self


class Cut:
    """A step of a reply: the connection ends here."""


Step = bytes | float | Cut
"""What a reply does next: send bytes as a chunk, pause for seconds, or end the connection."""


@dataclass
class Reply:
    """One answer."""

    steps: Sequence[Step] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})


DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def message(text: str, ids: Sequence[int] | None = None, finish: str | None = None) -> bytes:
    """A chunk of /v1/completions."""
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
    if ids is not None:
        choice["token_ids"] = list(ids)
    return event(choices=[choice])


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    told: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        told["prompt_tokens_details"] = {"cached_tokens": cached}
    return event(choices=[], usage=told)


def refusal(status: int, why: str, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": why}}).encode()
    return Reply(
        [body], status, {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    )


def obedient(body: dict[str, Any]) -> Reply:
    """As many tokens as are asked for, one a message, as a server that takes every field."""
    count = body["max_tokens"]
    finish = [*[None] * (count - 1), "length"]
    sent: list[bytes] = [message("x", [7], end) for end in finish]
    return Reply([*sent, usage(len(body["prompt"]), count), DONE])


class ScriptedServer:
    """Serves while it is entered, in a thread of its own.

    Attributes:
        asked: the bodies of the requests, in order of arrival.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply] = obedient, *, model: str = "scripted") -> None:
        self._reply, self._model = reply, model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client, or the test, is done
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # the test may be done just now
            await writer.wait_closed()
        self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in head.split("\r\n")[1:])}
        self.keys.append(headers.get("authorization", ""))
        if head.startswith("GET"):
            reply = Reply([json.dumps({"data": [{"id": self._model}]}).encode()])
        else:
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.asked.append(body)
            reply = self._reply(body)
        lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in reply.headers.items())]
        writer.write("\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode())
        for step in reply.steps:
            if isinstance(step, Cut):
                return False
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                writer.write(b"%x\r\n%s\r\n" % (len(step), step))
                await writer.drain()
        writer.write(b"0\r\n\r\n")
        return True
