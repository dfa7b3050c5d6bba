"""Keeps one server busy at one level, and gathers what came of it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .stream import Answer
from .target import Connections, Server, send
from .workload import Ask, Level, Workload

AFTER_FAILURE_S = 0.1
"""A client whose request failed waits so long before the next, or as long as the server asked for, up to
`MOST_RETRY_AFTER_S`: it would ask for nothing but refusals else."""

MOST_RETRY_AFTER_S = 5.0

LAG_EVERY_S = 0.05
"""How often the client looks whether it is late itself."""

SHOWN_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is asked.

    Attributes:
        requests: of a level; None: so many that `duration_s` passes.
        duration_s: nothing new is sent after this; what is under way ends.
        warmup: requests before, which are not counted.
        timeout_s: for each request.
    """

    requests: int | None
    duration_s: float | None
    warmup: int
    timeout_s: float


@dataclass(slots=True)
class Tally:
    """How far a level is: for the progress that is shown.

    Attributes:
        answered, failed: requests that have ended.
        running: answers that come now.
        tokens: of the ended ones.
    """

    answered: int = 0
    failed: int = 0
    running: dict[int, Answer] = field(default_factory=dict)
    tokens: float = 0.0

    @property
    def tokens_so_far(self) -> float:
        """With those of answers that come now."""
        return self.tokens + sum(sum(answer.tokens) for answer in self.running.values())


Show = Callable[[Tally], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one level.

    Attributes:
        answers: one for each request, in the order they were sent.
        began, ended: `time.perf_counter` of the first request and of the last answer's end.
        client_cpu_s: CPU seconds of this process between the two.
        client_lag_s: longest time for which this process did not get to its sockets: times are not better known than that.
    """

    answers: list[Answer]
    began: float
    ended: float
    client_cpu_s: float
    client_lag_s: float


async def measure(
    server: Server, workload: Workload, level: Level, extent: Extent, name: str, *, show: Show = lambda _: None
) -> Measured:
    """Warm up, then send the requests of one level and wait for the last answer.

    Args:
        name: of this part of the measurement, see `Workload.asks`.
        show: is called as it goes on.
    """
    connections = Connections(server.address)
    try:
        if extent.warmup:
            warming = workload.asks(server.form, f"{name} warm-up")
            load = _Load(server, connections, extent.timeout_s)
            await load.closed(itertools.islice(warming, extent.warmup), max(1, min(extent.warmup, _clients(level))))
        load = _Load(server, connections, extent.timeout_s)
        asks = workload.asks(server.form, name)
        with _without_collector():
            watching = asyncio.create_task(_watched(show, load.tally))
            cpu = time.process_time()
            began = time.perf_counter()
            until = None if extent.duration_s is None else began + extent.duration_s
            if level.kind == "concurrency":
                await load.closed(itertools.islice(asks, extent.requests), int(level.value), until)
            else:
                arriving = asks if level.kind == "trace" else workload.arrivals(asks, level.value, name)
                await load.open(itertools.islice(arriving, extent.requests), began, until)
            cpu = time.process_time() - cpu
            watching.cancel()
            longest = await watching
        ended = max((answer.ended for answer in load.answers), default=began)
        return Measured(load.answers, began, ended, cpu, longest)
    finally:
        connections.close()


def _clients(level: Level) -> int:
    return int(level.value) if level.kind == "concurrency" else 1


class _Load:
    """Requests under way to one server."""

    def __init__(self, server: Server, connections: Connections, timeout_s: float) -> None:
        self._server, self._connections, self._timeout_s = server, connections, timeout_s
        self.tally = Tally()
        self.answers: list[Answer] = []

    async def closed(self, asks: Iterator[Ask], clients: int, until: float | None = None) -> None:
        """So many clients, each sending its next request when its last one has ended."""

        async def client() -> None:
            for ask in asks:  # shared: each takes the next
                answer = await self._one(ask, None)
                if until is not None and time.perf_counter() >= until:
                    return
                if not answer.ok:
                    await asyncio.sleep(min(answer.retry_after_s or AFTER_FAILURE_S, MOST_RETRY_AFTER_S))

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())

    async def open(self, asks: Iterator[Ask], began: float, until: float | None) -> None:
        """Each request at its time, whatever has become of the others."""
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                assert ask.at is not None
                due = began + ask.at
                if until is not None and due >= until:
                    return
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self._one(ask, due))

    async def _one(self, ask: Ask, due: float | None) -> Answer:
        tally = self.tally
        answer = Answer.to(ask.prompt_tokens, ask.output_tokens, due=due)
        tally.running[id(answer)] = answer
        await send(self._server, self._connections, ask, timeout_s=self._timeout_s, answer=answer)
        del tally.running[id(answer)]
        self.answers.append(answer)
        tally.answered += answer.ok
        tally.failed += not answer.ok
        tally.tokens += sum(answer.tokens)
        return answer


async def _watched(show: Show, tally: Tally) -> float:
    """Shows how far it is, until it is cancelled; the longest time this thread took to come back to a timer."""
    longest = 0.0
    shown = time.perf_counter()
    try:
        while True:
            due = time.perf_counter() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            now = time.perf_counter()
            longest = max(longest, now - due)
            if now - shown >= SHOWN_EVERY_S:
                shown = now
                show(tally)
    except asyncio.CancelledError:
        return longest


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector would stop the client for milliseconds, which would look like the server's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
