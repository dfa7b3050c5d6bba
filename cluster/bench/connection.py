"""An HTTP/1.1 connection that costs little: the server that is measured shares the machine's cores with its client.

Chosen by measurement (`tests/bench/http_client.py`): 25 us of CPU time for each event that comes alone, parsing included, with
32 streams, so 40,000 a second for a core. A plain client of aiohttp takes 33, one of httpx 57 to 82, and neither says when a
socket was read. What this leaves out is what a measurement does not need: redirects, compression, proxies, retries of what a
server refused or broke.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from ...configs.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
MAX_HEAD = 64 << 10
"""Bytes of an answer's status line and headers: more is no HTTP."""

OnBody = Callable[[bytes, float], None]
"""Called with what came of a body, and when it was read (`time.perf_counter`)."""


class BrokenAnswerError(Exception):
    """The connection ended, or what came over it is not HTTP; says what."""


class ClosedBetweenError(BrokenAnswerError):
    """A connection that had answered before ended before a byte of this answer: the server closed it between the two."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        base: path before `/v1`, without a slash at its end.
    """

    host: str
    port: int
    secure: bool
    base: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Of http://HOST:PORT, with or without /v1.

        Raises:
            ConfigError: it is no such URL.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        else:
            if parts.scheme not in ("http", "https") or parts.query or parts.fragment or parts.username:
                host = None
        if not host:
            raise ConfigError(f"{url!r} is no server's URL; give one like http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(host, port or (443 if secure else 80), secure, base)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.base}"


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer; names of headers in lower case."""

    status: int
    headers: dict[str, str]


class Connection(asyncio.Protocol):
    """One connection, for one request at a time. Made by `connect`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._head: Head | None = None
        self._left: int | None = 0  # bytes of the body, or of its present chunk; None: until the connection ends
        self._chunked = False
        self._in_trailer = False
        self._on_body: OnBody | None = None
        self._answered: asyncio.Future[Head] | None = None
        self._reusable = True
        self._used = False  # it has answered a request before
        self._silent = True  # nothing of the present one has come
        self.idle_since = 0.0

    @classmethod
    async def connect(cls, address: Address) -> Connection:
        """Connect within `CONNECT_TIMEOUT_S`.

        Raises:
            OSError: nothing answers there; a `TimeoutError` is one, too.
        """
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if address.secure else None
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(cls, address.host, address.port, ssl=context)
        connection.idle_since = time.perf_counter()
        return connection

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent over it."""
        return self._reusable and self._transport is not None and not self._transport.is_closing()

    async def request(self, data: bytes, on_body: OnBody) -> Head:
        """Send a request and wait for the end of its answer.

        Args:
            data: the whole request.
            on_body: is given the body as it comes, without the marks of chunks.

        Raises:
            ClosedBetweenError: the connection, which had been used before, ended before anything came.
            BrokenAnswerError: the connection ended before the answer did, or what came is not HTTP.
        """
        assert self._answered is None, "one request at a time"
        if not self.reusable:
            raise BrokenAnswerError("the server has closed the connection")
        assert self._transport is not None
        self._head, self._on_body, self._silent = None, on_body, True
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            head = await self._answered
            self._used = True
            return head
        except asyncio.CancelledError:
            self.close()  # the answer goes on; only the end of the connection stops it
            raise
        finally:
            self._answered = self._on_body = None
            self.idle_since = time.perf_counter()

    def close(self) -> None:
        """End it at once."""
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()

    @property
    def head(self) -> Head | None:
        """Of the answer that is coming, once its headers are there."""
        return self._head

    # ---- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        now = time.perf_counter()
        if self._answered is None or self._answered.done():
            self.close()  # nobody has asked for it
            return
        self._silent = False
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            if self._head is None:
                data = self._take_head(data)
                if self._head is None:
                    return
            self._take_body(data, now)
        except BrokenAnswerError as error:
            self._fail(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._reusable = False
        if self._answered is None or self._answered.done():
            return
        if self._head is not None and self._left is None and error is None:
            self._answered.set_result(self._head)
            return
        when = "before it answered" if self._head is None else "in the middle of its answer"
        kind = ClosedBetweenError if self._used and self._silent else BrokenAnswerError
        self._fail(f"the server closed the connection {when}" + (f" ({error})" if error is not None else ""), kind)

    # ---- reading

    def _take_head(self, data: bytes) -> bytes:
        """Read status and headers; what follows them. Without `_head` afterwards there is more to come."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                raise BrokenAnswerError(f"the answer has more than {MAX_HEAD} bytes of headers")
            self._rest = data
            return b""
        lines = data[:end].decode("latin-1").split("\r\n")
        version, _, status = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise BrokenAnswerError(f"the answer is not HTTP/1.1: {lines[0][:80]!r}")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        head = Head(int(status[:3]), headers)
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._in_trailer = False
        self._left = 0
        if not self._chunked and head.status not in (204, 304):
            length = headers.get("content-length")
            if length is not None and not length.isdecimal():
                raise BrokenAnswerError(f"the answer's Content-Length is {length[:20]!r}")
            self._left = None if length is None else int(length)
        if headers.get("connection", "").lower() == "close" or self._left is None:
            self._reusable = False
        self._head = head
        return data[end + 4 :]

    def _take_body(self, data: bytes, now: float) -> None:
        """Hand on what there is of the body, and note its end."""
        assert self._on_body is not None
        if self._chunked:
            body, ended = self._unchunked(data)
        elif self._left is None:
            body, ended = data, False
        else:
            body, self._left = data[: self._left], max(0, self._left - len(data))
            ended = not self._left
        if body:
            self._on_body(body, now)
        if ended and self._answered is not None and not self._answered.done():
            assert self._head is not None
            self._answered.set_result(self._head)

    def _unchunked(self, data: bytes) -> tuple[bytes, bool]:
        """The body's bytes in `data`, and whether it ends there. An unfinished mark is kept for the next read."""
        pieces = []
        at, size = 0, len(data)
        left = self._left or 0  # of the present chunk, with the line end after it
        while at < size:
            if left > 2:
                piece = data[at : at + left - 2]
                pieces.append(piece)
                at += len(piece)
                left -= len(piece)
            elif left:
                step = min(left, size - at)
                at += step
                left -= step
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._rest = data[at:]
                    break
                line, at = data[at:end], end + 2
                if self._in_trailer:
                    if not line:
                        return b"".join(pieces), True
                    continue
                try:
                    length = int(line.partition(b";")[0], 16)
                except ValueError:
                    raise BrokenAnswerError(f"a chunk of the answer has the size {line[:20]!r}") from None
                self._in_trailer = length == 0
                left = length + 2 if length else 0
        self._left = left
        return b"".join(pieces), False

    def _fail(self, why: str, kind: type[BrokenAnswerError] = BrokenAnswerError) -> None:
        self.close()
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(kind(why))
