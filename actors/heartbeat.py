"""Heartbeats: each end of a connection says every so often that it lives. One that says nothing is frozen, or its machine
is gone: the sockets of a stopped process stay open, and the kernel goes on to take in what is sent to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """How often two ends of a connection speak, and how long they listen.

    Attributes:
        every_s: an end with nothing else to say says so often that it lives.
        silent_after_s: an end that has said nothing for so long is lost.
    """

    every_s: float
    silent_after_s: float

    def __post_init__(self) -> None:
        assert 0 < self.every_s < self.silent_after_s, self


class Silence:
    """How long the other end has said nothing, measured by an end that may be held up itself. For one thread or loop.

    Whoever gets no CPU, or whose event loop is busy, for some seconds has heard nothing either; what was sent meanwhile is
    still to be read. So no time between two looks counts for more than one beat, and one is to read before one looks.
    """

    def __init__(self, heartbeat: Heartbeat, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._heartbeat = heartbeat
        self._clock = clock
        self._looked_at = clock()
        self.seconds = 0.0

    def heard(self) -> None:
        """Something arrived."""
        self._looked_at = self._clock()
        self.seconds = 0.0

    def too_long(self) -> bool:
        """Look: whether the other end has been silent for too long by now."""
        now = self._clock()
        self.seconds += min(now - self._looked_at, self._heartbeat.every_s)
        self._looked_at = now
        return self.seconds >= self._heartbeat.silent_after_s

    @property
    def next_look_s(self) -> float:
        """When to look again, from now."""
        return min(self._heartbeat.every_s, self._heartbeat.silent_after_s - self.seconds)
