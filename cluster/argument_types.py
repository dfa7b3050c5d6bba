"""Numbers on the command line: what `argparse` calls to read and check them."""

from __future__ import annotations

import argparse
import re


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return number
