"""Whose turn it is: prompts and decoding within a step's budget, and who is let in."""

from __future__ import annotations

import pytest

from .scheduled_cache import advance, make, request, step


def test_prompts_run_in_chunks_within_the_budget() -> None:
    scheduler = make(budget=10)
    scheduler.add(request("long", 25, max_tokens=2))
    assert [step(scheduler) for _ in range(4)] == [
        [("long", 0, 10)],
        [("long", 10, 10)],
        [("long", 20, 5)],
        [("long", 25, 1)],
    ]
    assert step(scheduler) == []


def test_decoding_goes_before_prompts() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("first", 3))
    step(scheduler)
    scheduler.add(request("long", 100))
    assert step(scheduler) == [("first", 3, 1), ("long", 0, 7)]
    scheduler.add(request("late", 2))
    assert step(scheduler) == [("first", 4, 1), ("long", 7, 5), ("late", 0, 2)]


def test_admission_is_first_come_first_served() -> None:
    scheduler = make(pages=8, budget=64, running=8)
    scheduler.add(request("small", 8))
    scheduler.add(request("large", 24))  # 6 pages: would fit beside the first one, if that were not to grow
    scheduler.add(request("tiny", 2))
    assert step(scheduler) == [("small", 0, 8)], "the tiny one must not overtake the large one"


def test_what_will_not_grow_leaves_its_pages_to_others() -> None:
    scheduler = make(pages=8, budget=64, running=8)
    scheduler.add(request("small", 8, max_tokens=1))
    scheduler.add(request("large", 24, max_tokens=1))
    assert step(scheduler) == [("small", 0, 8), ("large", 0, 24)]


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    scheduler = make(pages=512, budget=16)
    scheduler.add(request("long", 1000, max_tokens=1))
    step(scheduler)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 6, max_tokens=1))
    assert step(scheduler) == [("long", 16, 8), ("a", 0, 6), ("b", 0, 2)]
    assert step(scheduler) == [("long", 24, 8), ("b", 2, 4), ("c", 0, 4)]
    assert step(scheduler) == [("long", 32, 14), ("c", 4, 2)]


def test_short_prompts_do_not_hold_up_a_long_one() -> None:
    """Two short ones come in every step, more than there is time for, and the long one has half of the time all the same."""
    scheduler = make(pages=2048, budget=16, running=16)
    scheduler.add(request("long", 160, max_tokens=1))
    for number in range(20):
        scheduler.add(request(f"{number} a", 8, max_tokens=1))
        scheduler.add(request(f"{number} b", 8, max_tokens=1))
        assert ("long", 8 * number, 8) in step(scheduler)
    assert [s.request.request_id for s in scheduler.running if s.request.request_id == "long"] == []


def test_most_running_sequences() -> None:
    scheduler = make(running=3, budget=16)
    for name in "abcde":
        scheduler.add(request(name, 2, max_tokens=2))
    assert [name for name, _, _ in step(scheduler)] == ["a", "b", "c"]
    assert [name for name, _, _ in step(scheduler)] == ["a", "b", "c"]
    assert [name for name, _, _ in step(scheduler)] == ["d", "e"]


def test_a_failed_step_is_scheduled_again() -> None:
    """Chunks that were never advanced (the experts were away) come back the same, and no page is taken twice."""
    scheduler = make(pages=8, budget=8)
    scheduler.add(request("a", 7))
    scheduler.add(request("b", 9))
    for _ in range(6):
        first = scheduler.schedule()
        used = scheduler.pool.in_use
        again = scheduler.schedule()
        assert [(c.sequence, c.start, c.length) for c in first] == [(c.sequence, c.start, c.length) for c in again]
        assert scheduler.pool.in_use == used
        advance(scheduler, again)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_removal_gives_everything_back(when: str) -> None:
    scheduler = make(budget=8, running=1)
    other = scheduler.add(request("other", 20))
    sequence = other if when != "waiting" else scheduler.add(request("gone", 20))
    for _ in range({"waiting": 1, "prefilling": 2, "decoding": 4}[when]):
        step(scheduler)
    scheduler.remove(sequence)
    scheduler.pool.check()
    assert scheduler.pool.in_use == (0 if sequence is other else len(other.pages))
