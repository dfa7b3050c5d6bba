"""Numbers on the command line: what `argparse` calls to read and check them."""

from __future__ import annotations

import argparse
import math
import re

LENGTHS_WRITTEN = "a number, LOW-HIGH, lognormal:MEDIAN:P95, or file:PATH with a number on each line"
"""How lengths in tokens are given; read by `simulation.trace.parse_lengths`."""


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    number = _finite(text)
    if number is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return number


def zero_or_more(text: str) -> float:
    """A finite number of at least 0."""
    number = _finite(text)
    if number is None or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of at least 0")
    return number


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
