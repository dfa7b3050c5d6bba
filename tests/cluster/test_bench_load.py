"""`moray bench` against a server that refuses, breaks, hangs or is not there: all is counted, nothing waits for ever."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from moray.cluster.bench.connection import Address, Connection
from moray.cluster.bench.figures import figures
from moray.cluster.bench.load import Extent, Measured, Tally, measure
from moray.cluster.bench.target import KEPT_S, Connections, Server, probed, send
from moray.cluster.bench.workload import Ask, Level, Turn, Workload
from moray.cluster.simulation.trace import Fixed
from moray.configs.errors import ClusterError

from .scripted_server import DONE, Cut, Reply, ScriptedServer, message, obedient, refusal, usage

WORKLOAD = Workload(Fixed(3), Fixed(4), None, 0, 500, 0)


def at(url: str, **changes: Any) -> Server:
    return replace(Server("scripted", Address.of(url), "scripted"), **changes)


def load(
    url: str,
    level: Level,
    requests: int | None,
    *,
    duration_s: float | None = None,
    warmup: int = 0,
    timeout_s: float = 30.0,
    workload: Workload = WORKLOAD,
) -> Measured:
    extent = Extent(requests, duration_s, warmup, timeout_s)
    return asyncio.run(measure(at(url), workload, level, extent, "test"))


def test_every_request_is_sent_and_counted_once() -> None:
    with ScriptedServer() as server:
        found = figures(load(server.url, Level("concurrency", 3), 10, warmup=2))
        assert (found.requests, found.outcomes) == (10, {"ok": 10})
        assert (found.output_tokens, found.prompt_tokens) == (40, 30)
        assert len(server.asked) == 12, "warm-up is asked and not counted"
        assert len({tuple(body["prompt"]) for body in server.asked}) == 12
        body = server.asked[-1]
    assert body.pop("prompt")
    assert body == {
        "model": "scripted",
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 4,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }


def test_as_many_at_once_as_there_are_clients() -> None:
    together, most, lock = itertools.count(1), 0, threading.Lock()
    gate: list[int] = []

    def reply(body: dict[str, Any]) -> Reply:
        nonlocal most
        with lock:
            gate.append(next(together))
        return Reply([0.02, *obedient(body).steps])

    with ScriptedServer(reply) as server:
        tallies: list[int] = []
        extent = Extent(12, None, 0, 30.0)

        def show(tally: Tally) -> None:
            tallies.append(len(tally.running))

        asyncio.run(measure(at(server.url), WORKLOAD, Level("concurrency", 4), extent, "test", show=show))
    assert len(gate) == 12
    assert all(count <= 4 for count in tallies)


def test_whatever_goes_wrong_is_counted_by_what_it_is() -> None:
    replies: Iterator[Callable[[dict[str, Any]], Reply]] = itertools.cycle(
        [
            obedient,
            lambda _: refusal(429, "full", Retry_After="0.01"),
            lambda _: refusal(503, "no experts"),
            lambda _: Reply([message("a", [1]), Cut()]),
            lambda _: Reply([Cut()]),
            lambda _: Reply([message("a", [1]), message("b", [2])]),
            lambda _: Reply([DONE]),
        ]
    )
    with ScriptedServer(lambda body: next(replies)(body)) as server:
        found = figures(load(server.url, Level("concurrency", 1), 14))
    assert found.outcomes == {
        "ok": 2,
        "HTTP 429": 2,
        "HTTP 503": 2,
        "broken connection": 4,
        "stream without an end": 2,
        "no token": 2,
    }
    assert found.details["HTTP 429"] == "full"
    assert found.output_tokens == 2 * 4 + 2 * 1 + 2 * 2, "what came of a broken answer counts as tokens"
    assert found.ttft.count == 2, "but its times do not"


def test_a_silent_server_is_given_up() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return Reply([message("a", [1]), 60.0, message("b", [2]), DONE])

    with ScriptedServer(reply) as server:
        began = time.monotonic()
        found = figures(load(server.url, Level("concurrency", 2), 4, timeout_s=0.2))
        assert time.monotonic() - began < 30
    assert found.outcomes == {"timed out": 4}
    assert found.details["timed out"] == "not answered within 0.2 s"
    assert found.output_tokens == 4


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert figures(load(url, Level("concurrency", 2), 3)).outcomes == {"no connection": 3}
    with pytest.raises(ClusterError, match="nothing answers at"):
        asyncio.run(probed(at(url, model=""), form=None))


def test_a_rate_does_not_wait_for_answers() -> None:
    """All six are under way before the first is answered."""
    started = threading.Semaphore(0)

    def reply(body: dict[str, Any]) -> Reply:
        started.release()
        return Reply([0.5, *obedient(body).steps])

    with ScriptedServer(reply) as server:
        found = load(server.url, Level("rate", 200.0), 6)
    sent = sorted(answer.sent for answer in found.answers)
    assert sent[-1] < min(answer.ended for answer in found.answers)
    assert all(answer.sent >= answer.due for answer in found.answers)
    assert figures(found).outcomes == {"ok": 6}


def test_a_trace_s_own_times() -> None:
    turns = tuple(Turn(None, 3, 2, None, at) for at in (0.0, 0.05, 0.3))
    with ScriptedServer() as server:
        found = load(server.url, Level("trace", 1.0), 3, workload=replace(WORKLOAD, trace=turns))
    due = sorted(answer.due - found.began for answer in found.answers)
    assert due == pytest.approx([0.0, 0.05, 0.3])


@pytest.mark.parametrize("level", [Level("concurrency", 2), Level("rate", 100.0)])
def test_a_duration_ends_it(level: Level) -> None:
    with ScriptedServer(lambda body: Reply([0.05, *obedient(body).steps])) as server:
        found = load(server.url, level, None, duration_s=0.3)
    assert found.answers
    assert max(answer.sent for answer in found.answers) <= found.began + 0.35
    assert all(answer.ok for answer in found.answers), "what was under way is waited for"


def test_connections_are_used_again_while_they_are_fresh() -> None:
    async def main(url: str) -> None:
        server, connections = at(url), Connections(Address.of(url))

        async def used() -> Connection:
            assert (await send(server, connections, Ask([100], 1, 1), timeout_s=10.0)).ok
            connection = await connections.take()
            connections.give_back(connection)
            return connection

        first = await used()
        assert await used() is first
        first.idle_since = time.perf_counter() - 2 * KEPT_S
        other = await used()
        assert other is not first
        assert not first.reusable
        connections.close()
        assert not other.reusable

    with ScriptedServer() as server:
        asyncio.run(main(server.url))


class Unannounced(ScriptedServer):
    """Closes each connection without saying so, after its first answer: in the middle of the next request, so that no client
    can have noticed it before.

    Attributes:
        connections: how many there were.
        last_words: what it sends of an answer before it closes.
        thinks_s: how long it takes to close.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply] = obedient, *, last_words: bytes = b"") -> None:
        super().__init__(reply)
        self.connections = self.cut = 0
        self.last_words, self.thinks_s = last_words, 0.0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await super()._serve(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await super()._answer(reader, writer)
        await reader.readuntil(b"\r\n\r\n")
        self.cut += 1
        await asyncio.sleep(self.thinks_s)
        writer.write(self.last_words)
        return False


def test_connections_that_were_closed_between_two_requests_are_no_fault() -> None:
    with Unannounced() as server:
        server.thinks_s = 0.05
        measured = load(server.url, Level("concurrency", 2), 10)
        found = figures(measured)
        assert (found.requests, found.outcomes) == (10, {"ok": 10})
        assert (server.connections, server.cut) == (10, 8), (
            "each client finds its connection closed but for the first time"
        )
        assert len(server.asked) == 10
    late = sorted(answer.times[0] - answer.sent for answer in measured.answers)
    assert all(seconds > 0.05 for seconds in late[2:]), "time counts from the first sending"


def test_a_server_that_closes_after_each_answer() -> None:
    class Closing(ScriptedServer):
        async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            await super()._answer(reader, writer)
            return False

    with Closing() as server:
        assert figures(load(server.url, Level("concurrency", 3), 12)).outcomes == {"ok": 12}
        assert probe(server).model == "scripted"


def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    with Unannounced(last_words=b"HTTP/1.1") as server:
        assert figures(load(server.url, Level("concurrency", 1), 6)).outcomes == {"ok": 3, "broken connection": 3}
        assert (server.connections, len(server.asked)) == (3, 3)


def test_what_a_new_connection_does_not_answer_is_not_asked_for_again() -> None:
    class Mute(Unannounced):
        async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            if self.connections > 1:
                return False
            return await super()._answer(reader, writer)

    with Mute() as server:
        found = figures(load(server.url, Level("concurrency", 1), 4))
        assert found.outcomes == {"ok": 1, "broken connection": 3}
        assert found.details["broken connection"].startswith("the server closed the connection before it answered")
        assert server.connections == 4


# ---- what a server understands


def probe(server: ScriptedServer, **changes: Any) -> Server:
    form = changes.pop("form", None)
    return asyncio.run(probed(at(server.url, model="", **changes), form=form))


def test_a_server_that_takes_everything() -> None:
    with ScriptedServer(model="r1") as server:
        found = probe(server, key="sk-1")
        assert (found.model, found.form) == ("r1", "ids")
        assert found.fields == ("ignore_eos", "return_token_ids", "stream_options")
        assert set(server.keys) == {"Bearer sk-1"}


def test_fields_that_are_refused_are_left_out() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return refusal(400, "no such field") if "return_token_ids" in body else obedient(body)

    with ScriptedServer(reply) as server:
        assert probe(server).fields == ("ignore_eos", "stream_options")


def test_ids_that_are_refused_become_text_of_the_same_length() -> None:
    """This one counts a token for each two characters."""

    def reply(body: dict[str, Any]) -> Reply:
        if isinstance(body["prompt"], list):
            return refusal(422, "text, please")
        return Reply([message("x", [1]), usage(1 + len(body["prompt"]) // 2, 1), DONE])

    with ScriptedServer(reply) as server:
        found = probe(server)
        assert found.form == "text"
        assert found.characters_per_token == pytest.approx(2.0)
        with pytest.raises(ClusterError, match="does not answer a plain request: HTTP 422: text, please"):
            probe(server, form="ids")


def test_chat_is_asked_in_messages() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        assert body["messages"][0]["role"] == "user"
        return Reply([message("x", [1]), DONE])

    with ScriptedServer(reply) as server:
        found = probe(server, chat=True, form="text")
        assert found.form == "text"
        assert all("prompt" not in body for body in server.asked)


@pytest.mark.parametrize(("status", "told"), [(401, "answers 401"), (200, "is not OpenAI's API")])
def test_what_is_no_server(status: int, told: str) -> None:
    class Other(ScriptedServer):
        async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
            return True

    with Other() as server, pytest.raises(ClusterError, match=told):
        probe(server)
