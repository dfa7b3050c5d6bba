"""Virtual time: what is to happen when, in an order that depends on nothing but what was asked for."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

Action = Callable[[], None]


class Timer:
    """Something that is to happen; `cancel` it as long as it has not."""

    __slots__ = ("action", "at")

    def __init__(self, at: float, action: Action) -> None:
        self.at = at
        self.action: Action | None = action

    def cancel(self) -> None:
        """Have it not happen. Idempotent."""
        self.action = None


class VirtualTime:
    """Runs actions in the order of their times, and those of one time in the order in which they were asked for.

    Attributes:
        now: seconds since the simulation's start; moves only while actions are run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._number = itertools.count()
        self._heap: list[tuple[float, int, Timer]] = []
        self._stopped = False

    def at(self, when: float, action: Action) -> Timer:
        """Have `action` run at a time that has not passed."""
        assert when >= self.now, (when, self.now)
        timer = Timer(when, action)
        heapq.heappush(self._heap, (when, next(self._number), timer))
        return timer

    def after(self, seconds: float, action: Action) -> Timer:
        """Have `action` run so many seconds from now."""
        return self.at(self.now + seconds, action)

    def every(self, seconds: float, action: Action) -> None:
        """Have `action` run again and again, for the first time after so many seconds."""

        def again() -> None:
            action()
            self.after(seconds, again)

        self.after(seconds, again)

    def stop(self) -> None:
        """Have `run` return after the action that runs now."""
        self._stopped = True

    def run(self, until: float = math.inf) -> None:
        """Run actions until none is left, one calls `stop`, or time reaches `until`."""
        while self._heap and not self._stopped:
            when, _, timer = self._heap[0]
            if when > until:
                break
            heapq.heappop(self._heap)
            if timer.action is not None:
                self.now = when
                timer.action()
        if not self._stopped and until < math.inf:
            self.now = max(self.now, until)
