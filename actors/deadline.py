"""Deadlines: every wait takes one, so that nothing waits for ever."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time on the monotonic clock, passed down through a call chain so that its waits share one budget."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that passes `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left; 0.0 once it has passed."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at
