"""From answers to figures. Pure arithmetic: every figure says how it is meant in `Figures`.

**Tokens that come together.** A delivery of n tokens that comes g seconds after the one before counts as n tokens of g/n
each: the reader of the stream gets n tokens in g. How long a stream stood still is told apart, by the deliveries' own gaps.
Tokens of the first delivery beyond the first have no gap: they are in `ttft`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .load import Measured
from .stream import Answer, Counting

_QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Times:
    """Some times, in seconds; zeros where there were none.

    A percentile is the smallest of the times that at least so many percent of them do not exceed: always one that was seen.

    Attributes:
        count: how many; tokens may be fractions, see `Counting`.
    """

    count: float
    mean: float
    p50: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray, weights: np.ndarray | None = None) -> Times:
        """Of these, each counting `weights` times (once if not given)."""
        values = np.asarray(seconds, dtype=np.float64)
        if not len(values):
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
        order = np.argsort(values, kind="stable")
        sorted_values, reached = values[order], np.cumsum(counts[order])
        total = float(reached[-1])
        # The sums are of floats: what is reached but for rounding is reached.
        at = [int(np.searchsorted(reached, q * total * (1 - 1e-12))) for q in _QUANTILES]
        p50, p95, p99 = (float(sorted_values[index]) for index in at)
        return cls(total, float(values @ counts) / total, p50, p95, p99, float(sorted_values[-1]))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one level of one server came to.

    Attributes:
        seconds: from the first request to the end of the last answer.
        requests: sent.
        outcomes: how many of them ended how; "ok" are those that were answered to their end.
        details: of each outcome but "ok", one in the server's words.
        output_tokens: that came, those of unfinished answers among them.
        prompt_tokens: of the answered requests.
        cached_tokens: of these, what the server says it had; None where it says nothing.
        short: answers that ended before they had as many tokens as was asked for.
        requests_per_s, output_per_s, total_per_s: answered requests, output tokens, and prompt and output tokens a second.
        ttft: from sending a request to its first token, of answered requests.
        itl: between two tokens of an answer, see the head of this file.
        delivery_gap: between two deliveries of an answer.
        latency: from sending a request to its end, of answered requests.
        tokens_per_delivery: on average.
        counted_by: what told the number of tokens, and for how many answers.
        miscounted: answers whose ids are not as many as the usage says.
        late: how late requests were sent, against when they were to be sent.
        client_cpu: share of a core that this client took.
        client_lag_s: longest time it did not get to its sockets.
    """

    seconds: float
    requests: int
    outcomes: dict[str, int]
    details: dict[str, str]
    output_tokens: float
    prompt_tokens: int
    cached_tokens: int | None
    short: int
    requests_per_s: float
    output_per_s: float
    total_per_s: float
    ttft: Times
    itl: Times
    delivery_gap: Times
    latency: Times
    tokens_per_delivery: float
    counted_by: dict[Counting, int]
    miscounted: int
    late: Times
    client_cpu: float
    client_lag_s: float

    @property
    def answered(self) -> int:
        """Requests that were answered to their end."""
        return self.outcomes.get("ok", 0)

    @property
    def failed(self) -> int:
        """Requests that were not."""
        return self.requests - self.answered


def figures(measured: Measured) -> Figures:
    """The figures of one level."""
    answers = measured.answers
    good = [answer for answer in answers if answer.ok]
    seconds = max(measured.ended - measured.began, 1e-9)
    prompt_tokens = sum(answer.prompt_tokens for answer in good)
    output_tokens = float(sum(sum(answer.tokens) for answer in answers))
    cached = [answer.cached_tokens for answer in good if answer.cached_tokens is not None]
    gaps, counts = gaps_of(good)
    with_tokens = [answer for answer in answers if answer.times]
    deliveries = sum(len(answer.times) for answer in with_tokens)
    return Figures(
        seconds=seconds,
        requests=len(answers),
        outcomes=dict(Counter(answer.outcome for answer in answers)),
        details={answer.outcome: answer.detail for answer in reversed(answers) if not answer.ok},
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(cached) if cached else None,
        short=sum(answer.output_tokens < answer.asked_tokens for answer in good),
        requests_per_s=len(good) / seconds,
        output_per_s=output_tokens / seconds,
        total_per_s=(prompt_tokens + output_tokens) / seconds,
        ttft=Times.of([answer.times[0] - answer.sent for answer in good]),
        itl=Times.of(gaps / counts, counts),
        delivery_gap=Times.of(gaps),
        latency=Times.of([answer.ended - answer.sent for answer in good]),
        tokens_per_delivery=output_tokens / deliveries if deliveries else 0.0,
        counted_by=dict(Counter(answer.counted_by for answer in with_tokens)),
        miscounted=sum(
            answer.counted_by == "token_ids" and answer.counted_tokens not in (None, answer.output_tokens)
            for answer in good
        ),
        late=Times.of([answer.sent - answer.due for answer in answers]),
        client_cpu=measured.client_cpu_s / seconds,
        client_lag_s=measured.client_lag_s,
    )


def gaps_of(answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds before each delivery but an answer's first, and its tokens."""
    times = [np.diff(np.asarray(answer.times)) for answer in answers]
    counts = [np.asarray(answer.tokens)[1:] for answer in answers]
    return np.concatenate([np.empty(0), *times]), np.concatenate([np.empty(0), *counts])


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of the first server over the same of the second, round by round.

    Attributes:
        median, least, most: of the rounds' ratios; NaN-free: rounds in which either has none are left out.
        rounds: how many count.
    """

    median: float
    least: float
    most: float
    rounds: int


COMPARED: tuple[tuple[str, str], ...] = (
    ("output tokens/s", "output_per_s"),
    ("requests/s", "requests_per_s"),
    ("to the first token, p50", "ttft.p50"),
    ("to the first token, p99", "ttft.p99"),
    ("between tokens, p50", "itl.p50"),
    ("between tokens, p99", "itl.p99"),
)
"""What is compared: its name, and where it is in `Figures`."""


def value_of(of: Figures, path: str) -> float:
    """The figure at a path of `COMPARED`."""
    value: object = of
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, float | int)
    return float(value)


def ratio(first: Sequence[Figures], second: Sequence[Figures], path: str) -> Ratio | None:
    """Of each round of the one to the same round of the other; None if there is nothing to compare."""
    pairs = [(value_of(a, path), value_of(b, path)) for a, b in zip(first, second, strict=True)]
    ratios = [a / b for a, b in pairs if a > 0 and b > 0]
    if not ratios:
        return None
    return Ratio(float(np.median(ratios)), min(ratios), max(ratios), len(ratios))
