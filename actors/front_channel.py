"""Messages between a front and a router over a socket: msgpack, length first. Nothing from the network is unpickled.

front -> router   generate id prompt generated sampling | cancel id | stats n | alive
router -> front   accepted id | refused id kind message ... | outputs [...]  once a step | stats n {...} | ending reason | alive

`accepted` may come after the first outputs of its request: two threads of the router send them. `ending` says that the
router fails or stops as a whole; it is the last that it says of any request. `alive` says nothing but that.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import msgpack

from ..configs.errors import (
    ContextTooLongError,
    ExpertsUnavailableError,
    MorayError,
    QueueFullError,
    RequestError,
    RouterLostError,
)
from ..model.sampling import SamplingParams
from .heartbeat import Heartbeat
from .messages import GenerateRequest, RouterStats, TokenLogprobs, TokenOutput

CHANNEL: Final = "front"
"""Name of this channel in the handshake."""

LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES: Final = 64 << 20
"""A prompt of R1's whole context is 0.7 MB; whatever claims to be longer than this is not one of ours."""

_MAX_ITEMS: Final = 1 << 14
"""Of a list or map: requests of a step, tokens of one, tokens to stop at. A list is allocated for as many items as its first
bytes claim, and each of 500 levels may claim anew, so that the message's own length is no bound."""

_MAX_TEXT_BYTES: Final = 1 << 20
"""Of a name or an error. Tokens travel as bytes."""

OF_ROUTERS: Final = Heartbeat(every_s=0.5, silent_after_s=2.5)
"""A router's beats come from a thread that waits for nothing else, however long a step takes. Five in a row are missed only
where the process is stopped or the network gone; a stream stands still for as long before it goes on elsewhere."""

OF_FRONTS: Final = Heartbeat(every_s=0.5, silent_after_s=2.5)
"""A front's beats come from its event loop, which a burst of requests may keep busy for a second or two: that alone must not
cut it off. With the second until the controller asks, whoever looks knows of a front that stands still within five."""


def encode(message: list[Any]) -> bytes:
    """One message with its length."""
    body: bytes = msgpack.packb(message)
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> list[Any]:
    """One message without its length.

    Raises:
        ValueError: it is not one.
    """
    message = msgpack.unpackb(
        body, max_array_len=_MAX_ITEMS, max_map_len=_MAX_ITEMS, max_str_len=_MAX_TEXT_BYTES, max_ext_len=0
    )
    if not isinstance(message, list) or not message or not isinstance(message[0], str):
        raise ValueError("not a message: must be a list that begins with its kind")
    return message


ALIVE: Final = encode(["alive"])


class MessageBuffer:
    """Makes messages of the pieces that a stream arrives in."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """The messages that are complete with `data`.

        Raises (from the iteration):
            ValueError: what arrived is not a message.
        """
        self._data += data
        while len(self._data) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._data)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE_BYTES}")
            end = LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[LENGTH.size : end])
            del self._data[:end]
            yield decode(body)


def generate_message(request: GenerateRequest) -> list[Any]:
    """A request as a message."""
    return [
        "generate",
        request.request_id,
        array("i", request.prompt_token_ids).tobytes(),
        array("i", request.generated_token_ids).tobytes(),
        asdict(request.sampling),
    ]


def request_from(message: list[Any]) -> GenerateRequest:
    """The request in a generate message; whether it can be served is the router's to say.

    Raises:
        ValueError, TypeError: the message does not hold a request.
    """
    _, request_id, prompt, generated, sampling = message
    if not isinstance(request_id, str) or not isinstance(prompt, bytes) or not isinstance(generated, bytes):
        found = ", ".join(type(part).__name__ for part in (request_id, prompt, generated))
        raise TypeError(f"a request needs a text id and twice packed tokens, got {found}")
    params = SamplingParams(**{**sampling, "stop_token_ids": tuple(sampling["stop_token_ids"])})
    return GenerateRequest(request_id, array("i", prompt).tolist(), params, array("i", generated).tolist())


def outputs_message(outputs: list[TokenOutput]) -> list[Any]:
    """A step's outputs as a message."""
    rows = []
    for output in outputs:
        logprobs = None
        if output.logprobs is not None:
            logprobs = [[entry.logprob, entry.top_ids, entry.top_logprobs] for entry in output.logprobs]
        end = [output.finish_reason, output.error, output.retry_after_s, output.cached_tokens]
        rows.append([output.request_id, output.token_ids, logprobs, *end])
    return ["outputs", rows]


def outputs_from(message: list[Any]) -> list[TokenOutput]:
    """The outputs in an outputs message."""
    return [
        TokenOutput(request_id, token_ids, None if logprobs is None else [TokenLogprobs(*e) for e in logprobs], *end)
        for request_id, token_ids, logprobs, *end in message[1]
    ]


def refusal_message(request_id: str, error: MorayError) -> list[Any]:
    """Why a request was not taken."""
    retry = error.retry_after_s if isinstance(error, QueueFullError) else None
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) else None
    return ["refused", request_id, type(error).__name__, str(error), param, code, retry]


def refusal_from(message: list[Any]) -> MorayError:
    """The error to raise for a refused message."""
    _, _, kind, text, param, code, retry = message
    if kind == QueueFullError.__name__:
        return QueueFullError(text, retry_after_s=retry)
    if kind == ContextTooLongError.__name__:
        return ContextTooLongError(text, param=param)
    if kind == RequestError.__name__:
        return RequestError(text, param=param, code=code)
    if kind == RouterLostError.__name__:
        return RouterLostError(text)
    return ExpertsUnavailableError(text)


def stats_message(number: int, stats: RouterStats) -> list[Any]:
    """A router's counters, in answer to stats request `number`."""
    return ["stats", number, asdict(stats)]
