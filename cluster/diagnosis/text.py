"""Quantities as people read them."""

from __future__ import annotations

GIB = 1 << 30


def gib(count: float) -> str:
    """Bytes of memory."""
    return f"{count / GIB:.1f} GiB"


def gbit(bytes_per_s: float) -> str:
    """A link's speed; three digits of it."""
    return f"{bytes_per_s * 8 / 1e9:.3g} Gbit/s"


def duration(seconds: float) -> str:
    """A short time, in the unit in which it has one to three digits before the point."""
    seconds = abs(seconds)
    for limit, factor, unit, digits in ((1e-3, 1e6, "us", 0), (1.0, 1e3, "ms", 1), (120.0, 1.0, "s", 1)):
        if seconds < limit:
            return f"{seconds * factor:.{digits}f} {unit}"
    return f"{seconds / 60:.0f} min"
