"""Running the prompts of one request against the engine, and ending every one of them however the request ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from ..engine_client import EngineClient
from ..messages import GenerateRequest, TokenOutput
from .answer import Answer, AnswerDelta, joined
from .http_errors import EngineFailedError
from .patience import Patience

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
    """The runs of one request, side by side.

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

    def deltas(self, patience: Patience) -> AsyncGenerator[tuple[int, AnswerDelta]]:
        """Every delta with the index of its run, in each run's order; what nobody took in time comes as one.

        Closing it ends every run that has not ended, and waits until the engine has let go of all of them.

        Args:
            patience: entered by the task that iterates; what it waits for here is the engine.

        Raises (from the iteration):
            Exception: what the engine raised for one of the runs.
        """
        # One run needs no task of its own, and a token no hop from one task to another.
        return self._run(0, patience) if len(self.runs) == 1 else self._side_by_side()

    async def _side_by_side(self) -> AsyncGenerator[tuple[int, AnswerDelta]]:
        untaken: dict[int, AnswerDelta | Exception] = {}
        arrived = asyncio.Event()

        async def run(number: int) -> None:
            try:
                async with Patience() as patience, aclosing(self._run(number, patience)) as deltas:
                    async for index, delta in deltas:
                        before = untaken.get(index)
                        untaken[index] = joined(before, delta) if isinstance(before, AnswerDelta) else delta
                        arrived.set()
            except Exception as error:
                # Whatever it is, the request's own task answers the client with it.
                untaken[number] = error
                arrived.set()

        tasks = [asyncio.create_task(run(number)) for number in range(len(self.runs))]
        unfinished = len(tasks)
        try:
            while unfinished:
                await arrived.wait()
                arrived.clear()
                taken, untaken = untaken, {}
                for index, item in taken.items():
                    if isinstance(item, Exception):
                        raise item
                    unfinished -= item.finish_reason is not None
                    yield index, item
        finally:
            await cancel_and_wait(tasks)

    async def _run(self, index: int, patience: Patience) -> AsyncGenerator[tuple[int, AnswerDelta]]:
        """One prompt, from start to end."""
        run = self.runs[index]
        answer, observer, clock = run.answer, self._observer, time.monotonic
        stall_timeout_s, stalled = self._stall_timeout_s, self._stalled
        reason = "error"
        outputs = self._client.generate(run.request)
        last = clock()
        first = True
        try:
            while True:
                patience.give(stall_timeout_s, stalled)
                output = await anext(outputs)
                now = clock()
                delta = answer.feed(output)
                if delta.token_ids:
                    observer.on_tokens(len(delta.token_ids), waited_s=now - last, first=first)
                    first, last = False, now
                if delta.finish_reason is not None:
                    reason = delta.finish_reason
                    yield index, delta
                    return
                yield index, delta
        except StopAsyncIteration:
            raise EngineFailedError("the engine ended the request without a reason") from None
        except asyncio.CancelledError:
            reason = "error" if patience.expired else "cancelled"
            raise
        except GeneratorExit:
            if reason == "error":  # closed early, by whoever iterates
                reason = "cancelled"
            raise
        finally:
            observer.on_end(reason, prompt_tokens=len(run.request.prompt_token_ids))
            await _let_go(outputs)

    def _stalled(self) -> EngineFailedError:
        return EngineFailedError(f"the engine sent nothing for {self._stall_timeout_s:g} s", status=503)


async def _let_go(outputs: AsyncGenerator[TokenOutput]) -> None:
    """Close the engine's iterator, though this be cancelled meanwhile: the engine must hear that the request is over."""
    closing = asyncio.create_task(outputs.aclose())
    try:
        await cancel_and_wait([], also=[closing])
    except asyncio.CancelledError:
        await cancel_and_wait([], also=[closing])
        raise


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
