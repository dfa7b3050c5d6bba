"""The arithmetic of `moray bench`: percentiles, tokens that come together, ratios."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.cluster.bench.figures import COMPARED, Figures, Ratio, Times, figures, ratio
from moray.cluster.bench.load import Measured
from moray.cluster.bench.report import doubts
from moray.cluster.bench.stream import Answer


def answer(
    sent: float, deliveries: list[tuple[float, int]], *, outcome: str = "ok", due: float | None = None, asked: int = 0
) -> Answer:
    """One whose tokens came so many seconds after it was sent."""
    tokens = sum(count for _, count in deliveries)
    return Answer(
        due=sent if due is None else due,
        sent=sent,
        prompt_tokens=10,
        asked_tokens=asked or tokens,
        outcome=outcome,
        detail="" if outcome == "ok" else f"{outcome}, it says",
        output_tokens=tokens,
        counted_tokens=tokens,
        counted_by="token_ids",
        ended=sent + (deliveries[-1][0] if deliveries else 1.0),
        times=array("d", (sent + at for at, _ in deliveries)),
        tokens=array("d", (count for _, count in deliveries)),
    )


def measured(answers: list[Answer], ended: float, cpu: float = 0.0) -> Measured:
    return Measured(answers, began=0.0, ended=ended, client_cpu_s=cpu, client_lag_s=0.0)


def test_percentiles_are_times_that_were_seen() -> None:
    seconds = [float(n) for n in range(1, 101)]
    random.Random(0).shuffle(seconds)
    assert Times.of(seconds) == Times(100, 50.5, 50.0, 95.0, 99.0, 100.0)
    assert Times.of([2.0]) == Times(1, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert Times.of([]) == Times(0, 0, 0, 0, 0, 0)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), min_size=1, max_size=50))
def test_a_weight_is_as_many_times(pairs: list[tuple[float, int]]) -> None:
    values, weights = zip(*pairs, strict=True)
    found = Times.of(values, np.asarray(weights, dtype=float))
    spread = Times.of([value for value, weight in pairs for _ in range(weight)])
    assert found.mean == pytest.approx(spread.mean)
    assert (found.count, found.p50, found.p95, found.p99) == (spread.count, spread.p50, spread.p95, spread.p99)


def test_tokens_that_come_together_share_their_gap() -> None:
    """First two tokens after 1 s; then three after 0.6 s; then one after 0.1 s."""
    found = figures(measured([answer(0.0, [(1.0, 2), (1.6, 3), (1.7, 1)])], ended=2.0))
    assert found.ttft.p50 == pytest.approx(1.0)
    assert (found.itl.count, found.delivery_gap.count) == (4, 2)
    assert [found.itl.p50, found.itl.longest] == pytest.approx([0.2, 0.2])
    assert found.itl.mean == pytest.approx((1.7 - 1.0) / 4)
    assert [found.delivery_gap.p50, found.delivery_gap.longest] == pytest.approx([0.1, 0.6])
    assert found.tokens_per_delivery == 2.0


def test_rates_and_outcomes() -> None:
    answers = [
        answer(0.0, [(0.5, 1), (1.0, 1)]),
        answer(1.0, [(0.5, 1), (1.0, 3)], asked=5),
        answer(1.0, [], outcome="HTTP 429"),
        answer(1.5, [], outcome="HTTP 429"),
        answer(1.5, [(0.5, 6)], outcome="broken connection"),
    ]
    answers[1].counted_tokens = 5
    found = figures(measured(answers, ended=4.0, cpu=1.0))
    assert (found.requests, found.answered, found.failed) == (5, 2, 3)
    assert found.outcomes == {"ok": 2, "HTTP 429": 2, "broken connection": 1}
    assert found.details == {"HTTP 429": "HTTP 429, it says", "broken connection": "broken connection, it says"}
    assert (found.output_tokens, found.prompt_tokens, found.cached_tokens) == (12, 20, None)
    assert (found.output_per_s, found.total_per_s, found.requests_per_s) == (3.0, 8.0, 0.5)
    assert (found.short, found.miscounted) == (1, 1)
    assert (found.ttft.count, found.latency.longest, found.client_cpu) == (2, 1.0, 0.25)
    assert found.counted_by == {"token_ids": 3}
    told = "\n".join(doubts(found))
    assert "2 of 5 requests: HTTP 429 (HTTP 429, it says)" in told
    assert "1 of 5 requests: broken connection" in told
    assert "1 answers are shorter" in told
    assert "another number of token ids" in told


def test_what_is_to_be_mistrusted() -> None:
    one = answer(0.5, [(0.5, 2), (1.0, 2)], due=0.2)
    one.counted_by, one.cached_tokens = "usage", 4
    other = answer(0.0, [(1.0, 1)])
    other.counted_by = "messages"
    found = figures(Measured([one, other], 0.0, 2.0, client_cpu_s=1.5, client_lag_s=0.2))
    assert found.cached_tokens == 4
    assert found.late.longest == pytest.approx(0.3)
    told = "\n".join(doubts(found))
    for expected in ("each message counts as one", "no token ids", "75% of a core", "300 ms late", "up to 200 ms"):
        assert expected in told
    assert doubts(figures(measured([answer(0.0, [(1.0, 1), (1.1, 1)])], ended=2.0))) == []


def test_nothing_at_all() -> None:
    found = figures(measured([], ended=0.0))
    assert (found.requests, found.output_per_s, found.itl.count) == (0, 0.0, 0)


def at_rate(tokens: int) -> Figures:
    return figures(measured([answer(0.0, [(1.0, 1), (2.0, tokens - 1)])], ended=2.0))


def test_ratios_are_those_of_the_same_round() -> None:
    first, second = [at_rate(n) for n in (20, 60, 40)], [at_rate(n) for n in (10, 20, 10)]
    assert ratio(first, second, "output_per_s") == Ratio(3.0, 2.0, 4.0, 3)
    assert ratio(first, second, "ttft.p50") == Ratio(1.0, 1.0, 1.0, 3)
    none = figures(measured([], ended=1.0))
    assert ratio([at_rate(8), none], [at_rate(4), at_rate(4)], "output_per_s") == Ratio(2.0, 2.0, 2.0, 1)
    assert all(ratio([none], [none], path) is None for _, path in COMPARED)
