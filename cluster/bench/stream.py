"""One streamed answer as it comes: which tokens at which time, and how it ended.

A *delivery* is what one read from the socket brought: tokens that come together, in one message or in several, are seen
together. With speculative decoding, or behind a server that gathers, that is more than one token.
"""

from __future__ import annotations

import json
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

Counting = Literal["token_ids", "usage", "messages"]
"""What tells how many tokens came: their ids in each message; the usage at the end, shared out evenly over the messages with
text; or nothing, so that each of those counts as one."""

OK = "ok"
NO_TOKEN = "no token"
_MOST_OF_ERROR = 4096
"""Bytes kept of an answer that is none."""


class EventSplitter:
    """Cuts a stream of server-sent events into the data of each. Comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that is whole now."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            if data.endswith(b"\r"):
                self._rest = data
                return []
            data = data.replace(b"\r\n", b"\n")
        *whole, self._rest = data.split(b"\n\n")
        return [event[6:] if event.startswith(b"data: ") and b"\n" not in event else _data(event) for event in whole]


def _data(event: bytes) -> bytes:
    """Of an event in any form the standard allows; empty if it has none."""
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are `time.perf_counter`'s, in seconds.

    Attributes:
        due: when it was to be sent; sent: when it was.
        outcome: "ok", or what went wrong, short enough to count by.
        detail: the same in the server's words.
        retry_after_s: what the server asked for; 0 if it did not.
        asked_tokens: of output.
        prompt_tokens: as the server counts them; as asked for where it does not.
        cached_tokens: of these, what the server says it did not compute again; None where it says nothing.
        output_tokens: that came; counted_tokens: how many the server says there were, None where it does not.
        finish_reason: the server's; None if it gave none.
        counted_by: see `Counting`.
        times: of each delivery with tokens; tokens: how many it had.
    """

    due: float
    sent: float
    prompt_tokens: int
    asked_tokens: int
    outcome: str = OK
    detail: str = ""
    retry_after_s: float = 0.0
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted_tokens: int | None = None
    finish_reason: str | None = None
    counted_by: Counting = "messages"
    ended: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))

    @classmethod
    def to(cls, prompt_tokens: int, asked_tokens: int, *, due: float | None = None) -> Answer:
        """To a request that is sent now."""
        now = time.perf_counter()
        return cls(now if due is None else due, now, prompt_tokens, asked_tokens)

    @property
    def ok(self) -> bool:
        """Whether it was answered to its end."""
        return self.outcome == OK


class StreamReader:
    """Reads the body of a streamed answer to /v1/completions or /v1/chat/completions into an `Answer`."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._events = EventSplitter()
        self._usage: dict[str, Any] | None = None
        self._messages = 0
        self._ids = 0
        self._done = False
        self._error = ""

    def feed(self, body: bytes, now: float) -> None:
        """More of it, read at `now`."""
        count = 0
        for data in self._events.feed(body):
            if data == b"[DONE]":
                self._done = True
            elif data:
                count += self._take(data)
        if count:
            self.answer.times.append(now)
            self.answer.tokens.append(count)

    def finish(self, now: float) -> Answer:
        """The body has ended: settle what came of it."""
        answer = self.answer
        answer.ended = now
        counted = self._usage.get("completion_tokens") if self._usage else None
        answer.counted_tokens = counted if isinstance(counted, int) else None
        if self._ids:
            answer.counted_by = "token_ids"
        elif answer.counted_tokens is not None and self._messages:
            answer.counted_by = "usage"
            each = answer.counted_tokens / self._messages
            answer.tokens = array("d", (each * messages for messages in answer.tokens))
        answer.output_tokens = round(sum(answer.tokens))
        if self._usage is not None:
            answer.prompt_tokens = int(self._usage.get("prompt_tokens") or answer.prompt_tokens)
            cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            answer.cached_tokens = None if cached is None else int(cached)
        if self._error:
            answer.outcome, answer.detail = "error in the stream", self._error
        elif not self._done and answer.finish_reason is None:
            answer.outcome, answer.detail = "stream without an end", "neither [DONE] nor a finish_reason came"
        elif not answer.times:
            answer.outcome, answer.detail = NO_TOKEN, "the answer ended without one"
        return answer

    def _take(self, data: bytes) -> int:
        """One event; how many tokens it brought, or 1 for a message with text where ids are not told."""
        try:
            event = json.loads(data)
            if "error" in event:
                error = event["error"]
                self._error = str(error["message"] if isinstance(error, dict) else error)
                return 0
            if event.get("usage"):
                self._usage = event["usage"]
            count = 0
            for choice in event["choices"]:
                if choice.get("finish_reason") is not None:
                    self.answer.finish_reason = choice["finish_reason"]
                ids = choice.get("token_ids")
                if ids:
                    self._ids += len(ids)
                    count += len(ids)
                elif ids is None and _has_text(choice):
                    self._messages += 1
                    count += 1
        except (ValueError, KeyError, TypeError, AttributeError):
            self._error = f"an event that is not OpenAI's: {data[:100]!r}"
            return 0
        return count


def _has_text(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"))


class ErrorReader:
    """Reads the body of an answer that is no stream: what the server says is wrong."""

    def __init__(self) -> None:
        self._body = b""

    def feed(self, body: bytes, now: float) -> None:  # noqa: ARG002
        """More of it."""
        if len(self._body) < _MOST_OF_ERROR:
            self._body += body

    @property
    def message(self) -> str:
        """In its own words, on one line."""
        text = self._body[:_MOST_OF_ERROR].decode(errors="replace")
        try:
            found = json.loads(text)
            error = found.get("error", found)
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            pass  # not as OpenAI writes it: shown as it is
        return " ".join(text.split())[:300]
