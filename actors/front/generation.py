"""Running the prompts of one request against the engine, and ending every one of them however the request ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from ..engine_client import EngineClient
from ..messages import GenerateRequest, TokenOutput
from .answer import Answer, AnswerDelta
from .http_errors import EngineFailedError

logger = logging.getLogger(__name__)

CLEANUP_S = 10.0
"""How long the engine may take to let go of a cancelled request before it is left behind with an error in the log."""


class TokenObserver(Protocol):
    """Is told of every output: for metrics."""

    def on_tokens(self, count: int, *, waited_s: float, first: bool) -> None:
        """`count` tokens came `waited_s` seconds after the output before or, if `first`, after the start."""

    def on_end(self, reason: str, *, prompt_tokens: int) -> None:
        """One prompt's generation ended: stop, length, cancelled or error."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt on its way to the engine, and its answer so far."""

    request: GenerateRequest
    answer: Answer


class Generation:
    """The runs of one request, side by side. Use as `async with`: leaving it cancels what has not ended.

    Args:
        client: the engine.
        runs: one per prompt.
        stall_timeout_s: a run that gets nothing for so long ends with `EngineFailedError`.
        observer: told of tokens and ends.
    """

    def __init__(
        self, client: EngineClient, runs: Sequence[Run], *, stall_timeout_s: float, observer: TokenObserver
    ) -> None:
        self.runs = tuple(runs)
        self._client = client
        self._stall_timeout_s = stall_timeout_s
        self._observer = observer
        self._tasks: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[tuple[int, AnswerDelta | Exception]] = asyncio.Queue()
        self._unfinished = len(self.runs)
        self._closing: set[int] = set()  # runs that are letting go of the engine by themselves

    @property
    def finished(self) -> bool:
        """Whether the last delta of every run has been handed out."""
        return self._unfinished == 0

    async def next(self, *, timeout_s: float) -> tuple[int, AnswerDelta] | None:
        """The next delta with the index of its run, in each run's order; None if none came in time.

        Raises:
            Exception: what the engine raised for one of the runs.
        """
        assert self._tasks, "use `async with`"
        try:
            async with asyncio.timeout(timeout_s):
                index, event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, Exception):
            raise event
        if event.finish_reason is not None:
            self._unfinished -= 1
        return index, event

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(index, run)) for index, run in enumerate(self.runs)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A run that is closing must not be cancelled in the middle: the engine would not hear that it is over.
        running = [task for index, task in enumerate(self._tasks) if index not in self._closing]
        closing = [task for index, task in enumerate(self._tasks) if index in self._closing]
        await cancel_and_wait(running, also=closing)

    async def _run(self, index: int, run: Run) -> None:
        """One prompt, from start to end. The task owns the engine's iterator, so that it can always be closed."""
        reason = "error"
        outputs = self._client.generate(run.request)
        last = time.monotonic()
        first = True
        try:
            while True:
                output = await self._next_output(outputs)
                now = time.monotonic()
                before = run.answer.completion_tokens
                delta = run.answer.feed(output)
                if delta.token_ids:
                    self._observer.on_tokens(run.answer.completion_tokens - before, waited_s=now - last, first=first)
                    first, last = False, now
                reason = delta.finish_reason or reason
                self._events.put_nowait((index, delta))
                if delta.finish_reason is not None:
                    return
        except asyncio.CancelledError:
            reason = "cancelled"
            raise
        except Exception as error:
            # Whatever it is, the request's own task answers the client with it.
            self._events.put_nowait((index, error))
        finally:
            self._closing.add(index)
            self._observer.on_end(reason, prompt_tokens=len(run.request.prompt_token_ids))
            await outputs.aclose()

    async def _next_output(self, outputs: AsyncIterator[TokenOutput]) -> TokenOutput:
        try:
            async with asyncio.timeout(self._stall_timeout_s) as stall:
                return await anext(outputs)
        except TimeoutError:
            if not stall.expired():
                raise
            raise EngineFailedError(f"the engine sent nothing for {self._stall_timeout_s:g} s", status=503) from None
        except StopAsyncIteration:
            raise EngineFailedError("the engine ended the request without a reason") from None


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]], *, also: Collection[asyncio.Task[Any]] = ()) -> None:
    """Cancel tasks and wait until they have cleaned up, at most `CLEANUP_S`; errors of the cleanup are logged.

    Args:
        tasks: what to cancel.
        also: what to wait for as well, without cancelling it before the time is up.
    """
    if not tasks and not also:
        return
    for task in tasks:
        task.cancel()
    done, stuck = await asyncio.wait({*tasks, *also}, timeout=CLEANUP_S)
    for task in stuck:
        task.cancel()
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("cleaning up a request failed", exc_info=error)
    if stuck:
        logger.error("%d cancelled requests did not end within %g s", len(stuck), CLEANUP_S)
