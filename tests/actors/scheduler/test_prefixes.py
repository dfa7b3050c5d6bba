"""Prompts that begin alike: what is computed once, and whose pages are whose."""

from __future__ import annotations

import pytest

from .scheduled_cache import PAGE, make, request, step


@pytest.mark.parametrize("prompt", [PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 1])
def test_prefixes_are_found_again(prompt: int) -> None:
    scheduler = make()
    scheduler.add(request("a", range(prompt), max_tokens=2))
    step(scheduler)
    step(scheduler)
    scheduler.add(request("b", range(prompt), max_tokens=2))
    hit = (prompt - 1) // PAGE * PAGE  # the last token is always computed: a cached row has no logits
    assert step(scheduler) == [("b", hit, prompt - hit)]
    assert scheduler.prefix_hit_tokens == hit


def test_prefixes_are_shared_while_in_use() -> None:
    scheduler = make(pages=9, budget=32)
    scheduler.add(request("a", range(17), max_tokens=20))
    step(scheduler)
    scheduler.add(request("b", [*range(16), 99], max_tokens=20))
    step(scheduler)
    a, b = scheduler.running
    assert a.pages[:4] == b.pages[:4]
    assert scheduler.pool.in_use == 6
    scheduler.remove(a)
    assert scheduler.pool.in_use == 5
    assert b.pages[:4] == [p for p in b.pages[:4] if p in scheduler.pool._references]


@pytest.mark.parametrize("budget", [16, 40, 512, 4096])
def test_a_prefix_that_many_ask_for_at_once_is_computed_once(budget: int) -> None:
    scheduler = make(pages=1024, budget=budget, running=32 if budget > 16 else 16)
    tails = [1 + index % 7 for index in range(32)]
    for index, tail in enumerate(tails):
        scheduler.add(request(str(index), [*range(512), *([7000 + index] * tail)], max_tokens=1))
    while step(scheduler):
        pass
    assert scheduler.computed == 512 + sum(tails)
    assert scheduler.prefix_hit_tokens == 31 * 512


def test_who_waits_for_a_prefix_holds_its_pages_and_goes_on_as_they_are_filled() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("a", range(21), max_tokens=2))
    scheduler.add(request("b", [*range(16), 99, 98], max_tokens=2))
    assert step(scheduler) == [("a", 0, 8)]
    a, b = scheduler.running
    assert a.pages[:4] == b.pages[:4]
    assert scheduler.pool.in_use == 7
    assert step(scheduler) == [("a", 8, 8)]
    assert step(scheduler) == [("a", 16, 5), ("b", 16, 2)]


@pytest.mark.parametrize("how", ["removed", "preempted"])
def test_others_go_on_with_a_prefix_whose_owner_is_gone(how: str) -> None:
    """The page that it had begun is computed again, those that it had filled are not."""
    scheduler = make(budget=10)
    first = scheduler.add(request("first", range(40), max_tokens=1))
    for index in range(3):
        scheduler.add(request(str(index), [*range(33), 99 + index, index], max_tokens=1))
    assert step(scheduler) == [("first", 0, 10)]
    if how == "removed":
        scheduler.remove(first)
    else:
        scheduler._preempt(first)
        assert scheduler.preempted_tokens == 2, "the others keep the rest"
    assert step(scheduler) == [("0" if how == "removed" else "first", 8, 10)]
    while step(scheduler):
        pass
    assert scheduler.computed == 10 + 24 + 3 * 3 + (8 if how == "preempted" else 0)
    assert scheduler.pool.in_use == 0


def test_an_early_prompt_that_waits_for_a_late_one_lends_it_its_place() -> None:
    """The late one computes what both need: it has the time that the early one would have, whatever else is there."""
    scheduler = make(pages=256, budget=8)
    scheduler.add(request("other", 400, max_tokens=1))
    early = scheduler.add(request("early", [*range(200), 1], max_tokens=1))
    step(scheduler)
    late = scheduler.add(request("late", [*range(200), 2, 3], max_tokens=1))
    step(scheduler)
    scheduler._preempt(early)
    scheduler.waiting.remove(early)  # for a step, in which the late one takes over
    step(scheduler)
    scheduler.waiting.append(early)
    scheduler.remove(next(iter(scheduler.running)))
    for name in ("x", "y"):
        scheduler.add(request(name, 90, max_tokens=1))
    for _ in range(4):
        before = late.computed
        assert ("late", before, 4) in step(scheduler), "half of the budget, though others have less to compute"
        assert early.computed == before // PAGE * PAGE


def test_matched_pages_are_not_evicted_for_the_same_request() -> None:
    """The pool holds nothing but the request's own cached prefix and too few others: it takes both, and overlaps nothing."""
    scheduler = make(pages=6, budget=64)
    scheduler.add(request("a", range(12), max_tokens=1))
    scheduler.add(request("other", 12, max_tokens=1))
    step(scheduler)
    assert (scheduler.pool.cached, scheduler.pool.free) == (6, 0)
    scheduler.add(request("b", range(24), max_tokens=1))
    assert step(scheduler) == [("b", 12, 12)]
    assert scheduler.prefix_hit_tokens == 12
