"""How long a device has computed, asked from any thread at any time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyTime:
    """Adds up the time of computations that run one after the other.

    On a GPU a call returns before its kernels have run: events before and after them are looked at there, once they have
    passed, and nobody waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._lock = threading.Lock()  # guards the two above

    @property
    def seconds(self) -> float:
        """Of all computations that have ended."""
        with self._lock:
            while self._running and self._running[0][1].query():
                before, after = self._running.popleft()
                self._seconds += before.elapsed_time(after) / 1e3
            return self._seconds

    @contextmanager
    def measured(self) -> Iterator[None]:
        """What is computed inside counts; by one thread at a time, on its current stream."""
        if self._cuda:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            try:
                yield
            finally:
                after.record()
                with self._lock:
                    self._running.append((before, after))
                _ = self.seconds  # so that the queue stays short, whoever asks how seldom
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - started
