"""Too few pages for all: who loses its own, and what becomes of it."""

from __future__ import annotations

from .scheduled_cache import advance, make, request, step


def test_the_latest_is_preempted_and_comes_back_first() -> None:
    scheduler = make(pages=5, budget=16)
    scheduler.add(request("old", 8, max_tokens=8))
    scheduler.add(request("new", 7, max_tokens=6))
    scheduler.add(request("newest", 1, max_tokens=1))
    assert step(scheduler) == [("old", 0, 8), ("new", 0, 7)], "a page is kept for each of them to grow"
    assert step(scheduler) == [("old", 8, 1), ("new", 7, 1)], "old has a third page now"
    assert step(scheduler) == [("old", 9, 1)], "and there is none for new"
    assert (scheduler.preemptions, scheduler.preempted_tokens) == (1, 8)
    assert [s.request.request_id for s in scheduler.waiting] == ["new", "newest"]
    finished = [step(scheduler) for _ in range(20)]
    assert finished[-1] == []
    assert (scheduler.pool.in_use, len(scheduler.waiting), len(scheduler.running)) == (0, 0, 0)


def test_who_loses_least_is_preempted() -> None:
    """The latest has computed most, the second shares what it has computed with the first, which is never preempted."""
    scheduler = make(pages=14, budget=64)
    scheduler.add(request("first", range(9), max_tokens=20))
    step(scheduler)
    scheduler.add(request("second", [*range(8), 99], max_tokens=20))
    scheduler.add(request("third", 15, max_tokens=20))
    while not scheduler.preemptions:
        assert step(scheduler)
    assert [s.request.request_id for s in scheduler.waiting] == ["second"]
    (second,) = scheduler.waiting
    assert scheduler.preempted_tokens == len(second.tokens) - 1 - 8
    while step(scheduler):
        pass
    assert scheduler.pool.in_use == 0


def test_of_equals_the_latest_is_preempted() -> None:
    scheduler = make(pages=7, budget=64)
    for name in "abc":
        scheduler.add(request(name, 4, max_tokens=12))
    while not scheduler.preemptions:
        step(scheduler)
    assert [s.request.request_id for s in scheduler.waiting] == ["c"]


def test_under_shortage_few_are_preempted() -> None:
    """Requests are let in one by one as pages come free, not all at once to be thrown out again."""
    scheduler = make(pages=32, budget=32, running=32)
    for number in range(40):
        scheduler.add(request(str(number), 16, max_tokens=24))
    while step(scheduler):
        pass
    assert scheduler.preemptions <= 10
    assert scheduler.computed <= 1.15 * 40 * (16 + 23)


def test_a_preempted_answer_keeps_its_tokens() -> None:
    """What was generated before the preemption is computed again as if it were prompt, and goes on from there."""
    scheduler = make(pages=6, budget=16)
    scheduler.add(request("old", 11, max_tokens=12))
    scheduler.add(request("new", 3, max_tokens=8))
    step(scheduler)
    step(scheduler)
    (new,) = [s for s in scheduler.running if s.request.request_id == "new"]
    before = None
    while new in scheduler.running:
        before = list(new.tokens)
        step(scheduler)
    assert before is not None
    assert new.tokens == before
    assert new.generated > 0
    while new not in scheduler.running:
        chunks = scheduler.schedule()
        for again in (c for c in chunks if c.sequence is new):
            assert again.start + again.length == len(before)
        advance(scheduler, chunks)
    assert new.tokens[: len(before)] == before


def test_nothing_stands_still_where_pages_are_short() -> None:
    """Its pages go to an older one; nothing of it is left over, and both end."""
    scheduler = make(pages=6, budget=8)
    scheduler.add(request("prompt", 22, max_tokens=1))
    assert step(scheduler) == [("prompt", 0, 8)]
    scheduler.add(request("other", 8, max_tokens=6))
    while scheduler.waiting or scheduler.running:
        assert step(scheduler), "nothing runs though there is work"
    assert scheduler.pool.in_use == 0


def test_one_sequence_may_fill_the_whole_pool() -> None:
    scheduler = make(pages=4, budget=8)
    scheduler.add(request("cached", 7, max_tokens=2))
    step(scheduler)
    step(scheduler)
    scheduler.add(request("all", 10, max_tokens=6))
    scheduler.add(request("small", 4, max_tokens=2))
    names = {name for _ in range(20) for name, _, _ in step(scheduler)}
    assert names == {"all", "small"}
    assert scheduler.pool.in_use == 0
