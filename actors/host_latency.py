"""How long one expert host usually takes to answer, and from when on it is late or lost: plain numbers, no clock."""

from __future__ import annotations

import math

_WINDOW = 64
"""Replies looked back on: a second or so of steps, so that a host that becomes slower for good is soon not late any more."""

_ENOUGH = 8
"""Replies of about one size before they tell anything."""

_LOOK_AGAIN_EVERY = 8
"""Replies between two looks at a window: sorting it for every reply would cost a router of many hosts milliseconds a step."""

_QUANTILE = 0.9
"""Of the window: an outlier in ten, such as the late replies of a host that was stopped, does not count as usual."""

_LEAST_ALLOWANCE_S = 0.06
"""On top of what is usual. A process that waits for a core on a busy machine loses tens of milliseconds with nothing wrong;
together with a step of 100 ms a stopped host still costs a stream less than 200 ms."""

_ALLOWANCE = 2.0
"""And at least so many times what is usual, on top of it."""

_UNKNOWN_ALLOWED_S = 1.0
"""While nothing is known, such as after a link was made: first calls set up threads, memory and kernels."""

_LEAST_FENCE_S = 1.0
_FENCE = 10.0
"""A host is given up after so many times what is usual: making a new link costs more than a reply that comes late."""


class HostLatency:
    """The recent reply times of one host, from the send on, by the number of (token, expert) pairs asked for.

    Used by one thread, but for `median_s`.

    Attributes:
        median_s: of the last replies of whatever size; 0 before the first.
    """

    def __init__(self) -> None:
        self.median_s = 0.0
        self._all = _Window()
        self._by_size: dict[int, _Window] = {}

    def record(self, pairs: int, seconds: float) -> None:
        """One reply for `pairs` pairs took so long."""
        size = _size(pairs)
        window = self._by_size.get(size)
        if window is None:
            window = self._by_size[size] = _Window()
        window.add(seconds)
        if self._all.add(seconds):
            self.median_s = self._all.quantile(0.5)

    def usual_s(self, pairs: int) -> float | None:
        """What a reply for `pairs` pairs hardly ever takes longer than; None while nothing is known.

        Where there were none of about that size, larger ones took no less, and smaller ones no less for each pair: both
        bound it.
        """
        size = _size(pairs)
        own = self._by_size.get(size)
        if own is not None and own.seen >= _ENOUGH:
            return own.usual
        known = {s: window.usual for s, window in self._by_size.items() if window.seen >= _ENOUGH}
        larger = min((s for s in known if s > size), default=None)
        smaller = max((s for s in known if s < size), default=None)
        bounds = [] if larger is None else [known[larger]]
        if smaller is not None:
            bounds.append(known[smaller] * 2.0 ** (size - smaller))
        return min(bounds, default=None)

    def limits_s(self, pairs: int) -> tuple[float, float]:
        """How long a reply for `pairs` pairs may take before the host is late, and for how long it may be silent that owes it.

        The latter is without end while nothing is known.
        """
        usual = self.usual_s(pairs)
        if usual is None:
            return _UNKNOWN_ALLOWED_S, math.inf
        return usual + max(_LEAST_ALLOWANCE_S, _ALLOWANCE * usual), max(_LEAST_FENCE_S, _FENCE * usual)


class _Window:
    """The last `_WINDOW` times; `usual` is their high quantile, which is up to `_LOOK_AGAIN_EVERY` times old."""

    def __init__(self) -> None:
        self.usual = 0.0
        self.seen = 0
        self._last: list[float] = []

    def add(self, seconds: float) -> bool:
        """Take one more; whether the window was looked at anew."""
        if len(self._last) < _WINDOW:
            self._last.append(seconds)
        else:
            self._last[self.seen % _WINDOW] = seconds
        self.seen += 1
        if self.seen % _LOOK_AGAIN_EVERY and self.seen > 1:
            return False
        self.usual = self.quantile(_QUANTILE)
        return True

    def quantile(self, share: float) -> float:
        return sorted(self._last)[math.ceil(share * len(self._last)) - 1]


def _size(pairs: int) -> int:
    """Class of the number: powers of two, within which times differ by a factor of two at most."""
    return pairs.bit_length()
