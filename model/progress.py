"""How far a long read has come: a bar on a terminal, else a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

HEARTBEAT_S = 5.0

_log = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Called with the bytes read since the last call, from any thread."""


class Progress(Protocol):
    """Where the progress of reads is shown."""

    def task(self, description: str, total_bytes: int) -> AbstractContextManager[Advance]:
        """Show a read of `total_bytes` called `description` for as long as the context is open."""
        ...


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:  # noqa: ARG002
        """See `Progress.task`."""
        yield lambda _: None


class TerminalProgress:
    """A bar with bytes, speed and time left, on standard error."""

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
        """See `Progress.task`."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
            bar = bars.add_task(description, total=total_bytes)
            yield lambda count: bars.advance(bar, count)


class HeartbeatProgress:
    """A log line every `interval_s` seconds, also while nothing moves, so that a stuck file system is seen."""

    def __init__(self, interval_s: float = HEARTBEAT_S) -> None:
        self.interval_s = interval_s

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
        """See `Progress.task`."""
        started = time.monotonic()
        done = 0
        lock = threading.Lock()
        finished = threading.Event()

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count

        def report() -> None:
            while not finished.wait(self.interval_s):
                seconds = time.monotonic() - started
                _log.info(
                    "%s: %.2f of %.2f GB read after %.0f s (%.2f GB/s)",
                    description,
                    done / 1e9,
                    total_bytes / 1e9,
                    seconds,
                    done / 1e9 / seconds,
                )

        reporter = threading.Thread(target=report, name="moray-heartbeat", daemon=True)
        reporter.start()
        try:
            yield advance
        finally:
            finished.set()
            reporter.join()


class CountingProgress:
    """Shows nothing, but can be asked from any thread how many bytes have been read: for a process without a terminal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done = 0

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:  # noqa: ARG002
        """See `Progress.task`; tasks add up."""
        yield self._advance

    def _advance(self, count: int) -> None:
        with self._lock:
            self.done += count


def default_progress() -> Progress:
    """A bar where standard error is a terminal, else the heartbeat."""
    return TerminalProgress() if sys.stderr.isatty() else HeartbeatProgress()
