"""Whether drafting tokens pays, now, with so many sequences: a decision from what steps took, without a tensor or a clock.

Verifying a draft is nearly free where a step waits, for the network or for memory that it reads anyway, and costs as much as
any token where it computes; how often drafts are right depends on what is asked. So nobody can know beforehand. What the
decision changes is how long answers take, never what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIAL_STEPS = 8
"""Decoding steps that the other way is tried for, of every `PERIOD_STEPS`: if it is twice as slow, that costs 1.6%."""

PERIOD_STEPS = 512

_TRIAL_AFTER = 16
"""Steps of a period before its trial: at the start there is something to compare with, and short answers have no trial."""

_WEIGHT = 0.125
"""Of the newest step in the averages: about the last ten count, so that a trial's do."""

_OUTLIER = 3.0
"""A step that took this many times the average counts as that much: somebody else had the machine."""


class DraftWhilePaid:
    """Draft while it takes less time a token than not drafting does; for each doubling of the number of sequences by itself."""

    def __init__(self) -> None:
        self._bands: dict[int, _Band] = {}

    def wanted(self, sequences: int) -> bool:
        """Whether to draft tokens for the next step, which decodes so many sequences. Counts as a step."""
        return self._band(sequences).next()

    def measured(self, sequences: int, *, drafted: bool, seconds: float, tokens: int) -> None:
        """Take in a step that decoded so many sequences, all of them with drafts or all without, and the tokens it gave."""
        self._band(sequences).costs[drafted].add(seconds, tokens)

    def pays(self, sequences: int) -> bool:
        """Whether drafting is the faster way as far as is known; before both were measured, it is."""
        return self._band(sequences).pays

    def _band(self, sequences: int) -> _Band:
        return self._bands.setdefault(sequences.bit_length(), _Band())


@dataclass(slots=True)
class _Cost:
    """Averages of one way to decode."""

    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        if not self.tokens:
            self.seconds, self.tokens = seconds, float(tokens)
            return
        seconds = min(seconds, _OUTLIER * self.seconds)
        self.seconds += _WEIGHT * (seconds - self.seconds)
        self.tokens += _WEIGHT * (tokens - self.tokens)


@dataclass(slots=True)
class _Band:
    """Numbers of sequences that are decided for together."""

    steps: int = 0
    costs: dict[bool, _Cost] = field(default_factory=lambda: {True: _Cost(), False: _Cost()})

    @property
    def pays(self) -> bool:
        with_drafts, without = self.costs[True], self.costs[False]
        if not (with_drafts.tokens and without.tokens):
            return True
        return with_drafts.seconds * without.tokens <= without.seconds * with_drafts.tokens

    def next(self) -> bool:
        trial = _TRIAL_AFTER <= self.steps % PERIOD_STEPS < _TRIAL_AFTER + TRIAL_STEPS
        self.steps += 1
        return self.pays != trial
