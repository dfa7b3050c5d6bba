"""Which pairs of nodes are measured at the same time: every pair once, and no node in two pairs of one round."""

from __future__ import annotations

from collections.abc import Sequence


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Rounds of disjoint pairs that together hold every pair once: N - 1 rounds for an even number of names, else N.

    The circle method of round-robin tournaments: one name stays, the others turn around it.
    """
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(a, b) for a, b in opposite if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found
