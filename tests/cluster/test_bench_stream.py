"""What `moray bench` reads off the wire: HTTP cut anywhere, events in every form, tokens counted in three ways."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moray.cluster.bench.connection import Address, BrokenAnswerError, Connection
from moray.cluster.bench.stream import Answer, ErrorReader, EventSplitter, StreamReader
from moray.configs.errors import ConfigError

from .scripted_server import DONE, event, message, usage


class Transport(asyncio.Transport):
    """Where a connection writes to, without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


def received(pieces: list[bytes], *, lost: bool = False) -> tuple[int, bytes, bool]:
    """Status and body of an answer that came in these pieces, and whether the connection can be used again."""

    async def main() -> tuple[int, bytes, bool]:
        connection = Connection()
        connection.connection_made(Transport())
        body: list[bytes] = []
        task = asyncio.create_task(connection.request(b"GET", lambda piece, _: body.append(piece)))
        await asyncio.sleep(0)
        for piece in pieces:
            connection.data_received(piece)
        if lost:
            connection.connection_lost(None)
        async with asyncio.timeout(5):
            head = await task
        return head.status, b"".join(body), connection.reusable

    return asyncio.run(main())


CHUNKED = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nb;name=x\r\n, world\r\n..\r\n0\r\nTrailer: x\r\n\r\n"
)
COUNTED = b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nsorry"


@pytest.mark.parametrize(
    ("answer", "status", "body"), [(CHUNKED, 200, b"hello, world\r\n.."), (COUNTED, 404, b"sorry")]
)
def test_an_answer_may_be_cut_anywhere(answer: bytes, status: int, body: bytes) -> None:
    for at in range(len(answer) + 1):
        assert received([piece for piece in (answer[:at], answer[at:]) if piece]) == (status, body, True)
    assert received([bytes([byte]) for byte in answer]) == (status, body, True)


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    assert received([b"HTTP/1.1 200 OK\r\n\r\nab", b"c"], lost=True) == (200, b"abc", False)


def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    assert received([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"]) == (200, b"", False)


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([], "before it answered"),
        ([CHUNKED[:-3]], "in the middle of its answer"),
        ([COUNTED[:-1]], "in the middle of its answer"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "not HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"], "Content-Length"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"], "size b'xyz'"),
        ([b"x" * 70_000], "bytes of headers"),
    ],
)
def test_what_is_no_answer(pieces: list[bytes], told: str) -> None:
    with pytest.raises(BrokenAnswerError, match=told):
        received(pieces, lost=True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/api/v1", "https://host:443/api"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_addresses(url: str, shown: str) -> None:
    assert str(Address.of(url)) == shown


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http://host:port", "http://me@host"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="give one like"):
        Address.of(url)


def test_events_in_every_form() -> None:
    stream = b": comment\n\ndata: a\n\ndata:b\r\n\r\nevent: x\ndata: c\ndata: d\nid: 7\n\n\n\ndata: e"
    for at in range(len(stream) + 1):
        splitter = EventSplitter()
        found = splitter.feed(stream[:at]) + splitter.feed(stream[at:]) + splitter.feed(b"f\n\n")
        assert [data for data in found if data] == [b"a", b"b", b"c\nd", b"ef"], at


def read(deliveries: list[tuple[float, bytes]], *, asked: int = 8) -> Answer:
    """The answer that came in these deliveries, at these times."""
    reader = StreamReader(Answer(0.0, 0.0, prompt_tokens=3, asked_tokens=asked))
    for at, body in deliveries:
        reader.feed(body, at)
    return reader.finish(deliveries[-1][0])


def test_token_ids_tell_how_many_came() -> None:
    """Three in one message, then two messages in one read, then a message whose text is held back, then one without a token."""
    answer = read(
        [
            (1.0, message("abc", [1, 2, 3])),
            (2.0, message("d", [4]) + message("e", [5])),
            (3.5, message("", [6])),
            (4.0, message("f", [], "stop") + usage(11, 6, cached=4)),
            (4.5, DONE),
        ]
    )
    assert (list(answer.times), list(answer.tokens)) == ([1.0, 2.0, 3.5], [3, 2, 1])
    assert (answer.output_tokens, answer.counted_tokens, answer.counted_by) == (6, 6, "token_ids")
    assert (answer.prompt_tokens, answer.cached_tokens) == (11, 4)
    assert (answer.outcome, answer.finish_reason, answer.ended) == ("ok", "stop", 4.5)


def test_usage_is_shared_out_where_there_are_no_ids() -> None:
    answer = read([(1.0, message("ab")), (2.0, message("c") + message("d")), (3.0, usage(5, 12) + DONE)])
    assert (list(answer.tokens), answer.output_tokens, answer.counted_by) == ([4, 8], 12, "usage")


def test_without_usage_each_message_counts_as_a_token() -> None:
    answer = read([(1.0, message("ab")), (2.0, message("c", finish="stop"))])
    assert (list(answer.tokens), answer.counted_by, answer.prompt_tokens) == ([1, 1], "messages", 3)
    assert answer.ok


def test_chat_and_its_thoughts() -> None:
    def delta(**fields: str) -> bytes:
        return event(choices=[{"index": 0, "delta": fields, "finish_reason": None}], usage=None)

    answer = read(
        [
            (0.5, delta(role="assistant", content="")),
            (1.0, delta(reasoning_content="hm")),
            (2.0, delta(reasoning="hm") + delta(content="so")),
            (3.0, usage(5, 3) + DONE),
        ]
    )
    assert (list(answer.times), list(answer.tokens)) == ([1.0, 2.0], [1, 2])


@pytest.mark.parametrize(
    ("body", "outcome", "told"),
    [
        (message("a", [1]), "stream without an end", "neither"),
        (message("a", [1]) + event(error={"message": "router-1 is gone"}), "error in the stream", "router-1 is gone"),
        (event(error="out of memory"), "error in the stream", "out of memory"),
        (message("", finish="stop") + DONE, "no token", "without one"),
        (b"data: so be it\n\n" + DONE, "error in the stream", "not OpenAI's: b'so be it'"),
        (event(choices=3), "error in the stream", "not OpenAI's"),
        (event(hello=1), "error in the stream", "not OpenAI's"),
    ],
)
def test_streams_that_are_no_answer(body: bytes, outcome: str, told: str) -> None:
    answer = read([(1.0, body)])
    assert answer.outcome == outcome
    assert told in answer.detail


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (json.dumps({"error": {"message": "no\n room"}}), "no room"),
        (json.dumps({"error": "full"}), "full"),
        (json.dumps({"detail": "x"}), "x"),
        ("<html>bad gateway</html>", "<html>bad gateway</html>"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_refusals_in_the_server_s_words(body: str, told: str) -> None:
    reader = ErrorReader()
    reader.feed(body.encode(), 0.0)
    assert told in reader.message
