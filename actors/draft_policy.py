"""Whether drafting tokens pays, now, with so many sequences: a decision from what steps took, without a tensor or a clock.

Verifying a draft is nearly free where a step waits, for the network or for memory that it reads anyway, and costs as much as
any token where it computes; how often drafts are right depends on what is asked. So nobody can know beforehand. What the
decision changes is how long answers take, never what is in them.

Two things are learnt apart, for they change for different reasons: by how much longer a step with drafts takes, from trials
in which both ways run right after each other, and how many tokens it gives, from every step that had drafts.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

TRIAL_STEPS = 8
"""Decoding steps in which the other way is tried, and of the usual one before them that they are compared with."""

FIRST_TRIAL, PERIOD_STEPS = 32, 512
"""Steps before the first trial; each next one comes after twice as many, up to the second. If the other way is twice as slow,
trials cost 1.6% in the long run."""

_TRIALS_COUNT = 4
"""About so many trials make the average: the machine may be another's for a while, and one trial must not decide for long."""

_GAIN_WEIGHT = 1 / 32
"""Of the newest step in the average of tokens: one answer's worth."""


class DraftWhilePaid:
    """Draft while that gives more tokens a second than not drafting; for each doubling of the number of sequences by itself."""

    def __init__(self) -> None:
        self._bands: dict[int, _Band] = {}

    def wanted(self, sequences: int) -> bool:
        """Whether to draft tokens for the next step, which decodes so many sequences. Counts as a step."""
        return self._band(sequences).next()

    def measured(self, sequences: int, *, drafted: bool, seconds: float, tokens: int) -> None:
        """Take in a step that decoded so many sequences, all of them with drafts or all without, and the tokens it gave."""
        self._band(sequences).measured(drafted, seconds, tokens / sequences)

    def pays(self, sequences: int) -> bool:
        """Whether drafting is the faster way as far as is known; before the first trial, it is."""
        return self._band(sequences).pays

    def _band(self, sequences: int) -> _Band:
        return self._bands.setdefault(sequences.bit_length(), _Band())


def pays(tokens: float, slowdown: float) -> bool:
    """Whether steps with drafts are faster: they give `tokens` for each sequence, and take `slowdown` times as long."""
    return tokens >= slowdown


@dataclass(slots=True)
class _Band:
    """Numbers of sequences that are decided for together."""

    slowdown: float = 1.0
    tokens: float = 0.0  # for each sequence of a step with drafts; 0 before there was one
    trials: int = 0
    steps: int = 0  # since the last trial
    tried: bool = False  # in the trial that is under way
    recent: dict[bool, deque[float]] = field(
        default_factory=lambda: {way: deque(maxlen=TRIAL_STEPS) for way in (True, False)}
    )  # seconds of the newest steps with drafts, and without

    @property
    def pays(self) -> bool:
        return not self.tokens or pays(self.tokens, self.slowdown)

    def next(self) -> bool:
        trial = min(PERIOD_STEPS, FIRST_TRIAL << self.trials)
        self.steps += 1
        if self.steps == trial:
            self.tried = not self.pays
        if trial <= self.steps < trial + TRIAL_STEPS:
            return self.tried
        if self.steps == trial + TRIAL_STEPS:
            self._conclude()
        return self.pays

    def measured(self, drafted: bool, seconds: float, tokens: float) -> None:
        self.recent[drafted].append(seconds)
        if drafted:
            self.tokens += (tokens - self.tokens) * (_GAIN_WEIGHT if self.tokens else 1.0)

    def _conclude(self) -> None:
        """Medians, for steps that somebody else held up must not count."""
        if min(map(len, self.recent.values())) >= TRIAL_STEPS // 2:
            found = statistics.median(self.recent[True]) / statistics.median(self.recent[False])
            self.trials += 1
            self.slowdown += (found - self.slowdown) / min(self.trials, _TRIALS_COUNT)
        for seconds in self.recent.values():
            seconds.clear()
        self.steps = 0
