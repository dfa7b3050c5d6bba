"""Shows how far the processes of a starting cluster are with fetching and reading their weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from ..model.progress import Progress, default_progress
from .node_weights import Fetching

_POLL_S = 0.5


class LoadingShown:
    """While it is entered, asks every half second and shows the answer: a bar on a terminal, else heartbeat lines.

    Args:
        ask: bytes read so far and in all; None while nobody can say.
    """

    def __init__(self, ask: Callable[[], tuple[int, int] | None], progress: Progress | None = None) -> None:
        self._ask = ask
        self._progress = progress or default_progress()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moray-loading", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        answer = self._ask()
        while answer is None:
            if self._stop.wait(_POLL_S):
                return
            answer = self._ask()
        done, total = answer
        if done >= total:
            return  # a small model: there is nothing to wait for
        while done < total and not self._stop.is_set():
            done, total = self._show(done, total)

    def _show(self, done: int, total: int) -> tuple[int, int]:
        """Show it until all is done, or there turns out to be more to do: what is done, and how much there is."""
        with self._progress.task("loading weights", total) as advance:
            advance(done)
            while done < total and not self._stop.wait(_POLL_S):
                answer = self._ask()
                if answer is not None:
                    advance(answer[0] - done)
                    done = answer[0]
                    if answer[1] != total:
                        return answer
        return done, total


class FetchedBytes:
    """Adds up what the nodes fetch: those that are done count on. Several processes of a node tell of one fetch."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def add(self, states: Iterable[Fetching]) -> tuple[int, int]:
        """Bytes done and in all, with those that go on now.

        Args:
            states: of every process that waits for a fetch.
        """
        going_on = {holder: (done, total) for holder, done, total in states}
        ended = {holder: (total, total) for holder, (_, total) in self._known.items()}
        self._known = ended | going_on
        return sum(done for done, _ in self._known.values()), sum(total for _, total in self._known.values())
