"""Fronts and routers over real sockets: what arrives, what is refused, who goes away."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

import msgpack
import pytest

from moray.actors import front_channel, router_connection
from moray.actors.messages import GenerateRequest, RouterStats, TokenLogprobs, TokenOutput, joined
from moray.actors.router_connection import RouterConnection, RouterStream
from moray.actors.testing import SECRET, EngineParts, random_prompt, run
from moray.configs.errors import (
    ClusterError,
    ContextTooLongError,
    ExpertsUnavailableError,
    HandshakeError,
    LinkError,
    MorayError,
    QueueFullError,
    RequestError,
    RouterLostError,
)
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

from .served import Served, eventually, in_loop, raw_front


@pytest.fixture(scope="module")
def read_once(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    return EngineParts(write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=5))


@pytest.fixture
def parts(read_once: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(read_once) as parts:
        yield parts


@pytest.fixture
def served(parts: EngineParts) -> Iterator[Served]:
    with contextlib.closing(Served(parts)) as served:
        yield served


def request(parts: EngineParts, name: str = "r", prompt: int = 6, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.8, "seed": 5, **sampling})
    return GenerateRequest(name, random_prompt(parts.config, prompt, prompt), params)


@contextlib.asynccontextmanager
async def connected(served: Served, secret: bytes = SECRET) -> AsyncIterator[RouterConnection]:
    connection = await RouterConnection.open("router-0", served.server.address, secret=secret, identity="front-0")
    try:
        yield connection
    finally:
        await connection.aclose()


@contextlib.asynccontextmanager
async def answer_of(connection: RouterConnection, request: GenerateRequest) -> AsyncIterator[RouterStream]:
    with contextlib.closing(await connection.submit(request)) as stream:
        yield stream


async def output_of(connection: RouterConnection, request: GenerateRequest) -> TokenOutput:
    """The whole answer: how many outputs it comes in depends on who is faster."""
    async with answer_of(connection, request) as stream:
        return joined([output async for output in stream])


def test_messages_survive_the_wire() -> None:
    sampling = SamplingParams(7, 0.5, 40, 0.9, 0.01, (1 << 64) - 1, 3, (1, 2))
    wanted = GenerateRequest("front/1", [0, 5, 271], sampling, [7, 270])
    outputs = [
        TokenOutput("a", [1, 2], [TokenLogprobs(-0.1234567890123456789, [1], [-2.5]), TokenLogprobs(-1.0, [], [])]),
        TokenOutput("b", [], None, "error", "é"),
        TokenOutput("c", [3], None, "stop", cached_tokens=64),
        TokenOutput("d", [], None, "error", "waited for too long", 2.5),
    ]

    def through(message: list[Any]) -> list[Any]:
        data = front_channel.encode(message)
        assert front_channel.LENGTH.unpack(data[:4]) == (len(data) - 4,)
        return front_channel.decode(data[4:])

    assert front_channel.request_from(through(front_channel.generate_message(wanted))) == wanted
    arrived = front_channel.outputs_from(through(front_channel.outputs_message(outputs)))
    assert arrived == outputs
    assert [output.cached_tokens for output in arrived] == [output.cached_tokens for output in outputs]
    stats = RouterStats("router-0", 1, 2, broken_links=["x"])
    kind, number, fields = through(front_channel.stats_message(3, stats))
    assert (kind, number, RouterStats(**fields)) == ("stats", 3, stats)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_messages_are_made_of_whatever_pieces_arrive(size: int) -> None:
    messages: list[list[Any]] = [*(["cancel", "x" * n] for n in (0, 1, 200)), ["alive"], ["stats", 7]]
    data = b"".join(front_channel.encode(message) for message in messages)
    buffer = front_channel.MessageBuffer()
    pieces = (data[i : i + size] for i in range(0, len(data), size))
    assert [message for piece in pieces for message in buffer.feed(piece)] == messages


@pytest.mark.parametrize(
    "error",
    [
        RequestError("bad", param="top_p", code="odd"),
        ContextTooLongError("long", param="max_tokens"),
        QueueFullError("full", retry_after_s=2.5),
        ExpertsUnavailableError("gone"),
        RouterLostError("stopping"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_refusals_come_back_as_what_they_were(error: MorayError) -> None:
    message = front_channel.decode(front_channel.encode(front_channel.refusal_message("r", error))[4:])
    back = front_channel.refusal_from(message)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_an_answer_is_what_the_router_gives(parts: EngineParts, served: Served) -> None:
    expected = run(parts.engine(), [request(parts, logprobs=2)]).outputs["r"]

    async def test() -> None:
        async with connected(served) as connection:
            assert await output_of(connection, request(parts, logprobs=2)) == joined(expected)
            assert connection.outstanding == 0
            stats = await connection.stats()
            assert (stats.router_id, stats.generated_tokens) == ("router-0", 8)

    in_loop(test)


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [({"max_tokens": 200}, ContextTooLongError), ({"top_p": 2.0}, RequestError), ({"temperature": "x"}, RequestError)],
    ids=["too-long", "top_p", "temperature"],
)
def test_refusals_are_raised_at_the_front(
    parts: EngineParts, served: Served, sampling: dict[str, Any], kind: type[RequestError]
) -> None:
    async def test() -> None:
        async with connected(served) as connection:
            with pytest.raises(kind) as refusal:
                await connection.submit(request(parts, **sampling))
            assert type(refusal.value) is kind
            assert connection.outstanding == 0
            assert len((await output_of(connection, request(parts))).token_ids) == 8, "it goes on"

    in_loop(test)


def test_another_secret_is_refused(served: Served) -> None:
    async def test() -> None:
        with pytest.raises(HandshakeError):
            async with connected(served, secret=b"another secret of 16 bytes"):
                pass

    in_loop(test)


def test_nobody_there() -> None:
    async def test() -> None:
        with pytest.raises(LinkError, match="cannot connect"):
            await RouterConnection.open("router-0", "127.0.0.1:1", secret=SECRET, identity="front-0")

    in_loop(test)


@pytest.mark.parametrize("how", ["stream-closed", "connection-closed"])
def test_a_front_that_goes_away_frees_its_pages(parts: EngineParts, served: Served, how: str) -> None:
    async def test() -> None:
        async with connected(served) as connection:
            stream = await connection.submit(request(parts, max_tokens=120))
            await anext(stream)
            if how == "stream-closed":
                stream.close()
                await eventually(lambda: served.router.stats().requests_cancelled == 1)
        await eventually(lambda: served.router.stats().requests_cancelled == 1)
        with contextlib.suppress(RouterLostError):
            _ = [output async for output in stream]
        stream.close()

    in_loop(test)
    assert served.router.pool.in_use == 0


def test_a_cancel_is_for_ones_own_requests(parts: EngineParts, served: Served) -> None:
    async def test() -> None:
        async with (
            connected(served) as one,
            connected(served) as two,
            answer_of(one, request(parts, max_tokens=40)) as stream,
        ):
            await anext(stream)
            await two._send(["cancel", "r"])
            await two.stats()
            assert (await anext(stream)).finish_reason is None
            assert [o async for o in stream][-1].finish_reason == "length"

    in_loop(test)


def test_a_lost_router_shows_in_running_answers(parts: EngineParts, served: Served) -> None:
    async def test() -> None:
        async with connected(served) as connection, answer_of(connection, request(parts, max_tokens=120)) as stream:
            await anext(stream)
            await asyncio.to_thread(served.server.close)
            with pytest.raises(RouterLostError, match="router-0 was lost while it answered"):
                _ = [output async for output in stream]
            with pytest.raises(RouterLostError, match="router-0 is lost"):
                await connection.submit(request(parts))
            with pytest.raises(ClusterError, match="router-0 is lost"):
                await connection.stats()

    in_loop(test)


def test_a_stopping_router_gives_up_its_answers_and_takes_no_others(parts: EngineParts, served: Served) -> None:
    async def test() -> None:
        async with (
            connected(served) as one,
            connected(served) as two,
            connected(served) as idle,
            answer_of(one, request(parts, "a", max_tokens=120)) as stream,
            answer_of(two, request(parts, "b", max_tokens=120)) as other,
        ):
            await anext(stream)
            await anext(other)
            await asyncio.to_thread(served.router.stop)
            for ended in (stream, other):
                with pytest.raises(RouterLostError, match=r"router-0 was lost .* the router is shutting down"):
                    _ = [output async for output in ended]
            assert idle.lost is None
            with pytest.raises(RouterLostError, match="shutting down"):
                await idle.submit(request(parts, "late"))
            assert idle.lost == "the router is shutting down"

    in_loop(test)


def test_a_router_that_does_not_answer_is_given_up(
    parts: EngineParts, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_connection, "_SUBMIT_TIMEOUT_S", 0.2)
    frozen = threading.Event()
    monkeypatch.setattr(served.router, "submit", lambda *_: frozen.wait(30))

    async def test() -> None:
        async with connected(served) as connection:
            with pytest.raises(RouterLostError, match=r"did not take a request within 0\.2 s"):
                await connection.submit(request(parts))
            assert connection.outstanding == 0

    try:
        in_loop(test)
    finally:
        frozen.set()


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def generate_with(**changes: Any) -> bytes:
    fields = {
        "id": "x",
        "prompt": b"\0\0\0\0",
        "generated": b"",
        "sampling": list(asdict(SamplingParams(1)).values()),
    } | changes
    return framed(msgpack.packb(["generate", *fields.values()]))


MALFORMED = {
    "too-long": struct.pack("<I", front_channel.MAX_MESSAGE_BYTES + 1),
    "not-msgpack": framed(b"\xc1\xc1"),
    "empty": framed(b""),
    "two-values": framed(b"\x01\x02"),
    "not-a-list": framed(msgpack.packb({"a": 1})),
    "empty-list": framed(msgpack.packb([])),
    "no-kind": framed(msgpack.packb([1, 2])),
    "unknown-kind": framed(msgpack.packb(["hello"])),
    "cancel-of-nothing": framed(msgpack.packb(["cancel"])),
    "stats-without-number": framed(msgpack.packb(["stats"])),
    "stats-of-text": framed(msgpack.packb(["stats", "x"])),
    "generate-short": framed(msgpack.packb(["generate", "x"])),
    "generate-number-as-id": generate_with(id=5),
    "generate-odd-prompt": generate_with(prompt=b"\0\0\0"),
    "generate-odd-answer": generate_with(generated=b"\0\0\0"),
    "generate-no-answer": generate_with(generated=None),
    "generate-list-prompt": generate_with(prompt=[1, 2]),
    "generate-no-sampling": generate_with(sampling=[]),
    "generate-short-sampling": generate_with(sampling=[1, ()]),
    "generate-map-sampling": generate_with(sampling={"max_tokens": 1}),
    "generate-long-sampling": generate_with(sampling=[1] * 20),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_message_drops_that_front_only(parts: EngineParts, served: Served, case: str) -> None:
    async def test() -> None:
        async with connected(served) as good, answer_of(good, request(parts, max_tokens=60)) as running:
            begun = await anext(running)
            with contextlib.closing(raw_front(served)) as sock:
                sock.sendall(MALFORMED[case])
                assert await asyncio.to_thread(sock.recv, 1) == b"", "the connection is closed without an answer"
            assert len(joined([begun, *[output async for output in running]]).token_ids) == 60

    in_loop(test)


def test_an_id_twice_from_one_front_drops_it(parts: EngineParts, served: Served) -> None:
    with contextlib.closing(raw_front(served)) as sock:
        message = front_channel.encode(front_channel.generate_message(request(parts, max_tokens=120)))
        sock.sendall(message + message)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 16):
                pass
    give_up = time.monotonic() + 20
    while served.router.busy and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not served.router.busy
