"""How long a request will wait in a queue, from how fast others have left it. Plain arithmetic."""

from __future__ import annotations

_REMEMBERED_S = 20.0
"""Time over which what was seen loses most of its weight: answers of chat take about so long."""

_LEAST_SEEN_S = 1.0
"""Nothing is said before a queue was seen for so long."""


class QueueTime:
    """Counts admissions while there is a queue; what comes while there is none says nothing of how fast it would go."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._admitted = 0.0

    def observe(self, admitted: int, seconds: float) -> None:
        """A step of `seconds` began with `admitted` requests and left others waiting."""
        kept = 1.0 - min(1.0, seconds / _REMEMBERED_S)
        self._seconds = kept * self._seconds + seconds
        self._admitted = kept * self._admitted + admitted

    def wait_s(self, requests: int) -> float | None:
        """Seconds until so many more requests have left the queue; None where that is not known."""
        if self._seconds < _LEAST_SEEN_S:
            return None
        return requests * self._seconds / max(self._admitted, 1.0)
