"""Drafts: how many are verified in a step, and what is left of those that are wrong."""

from __future__ import annotations

from .scheduled_cache import advance, make, request


def test_drafts_are_verified_with_what_is_left_of_the_budget() -> None:
    scheduler = make(budget=8)
    first, second = scheduler.add(request("a", 3)), scheduler.add(request("b", 2))
    advance(scheduler, scheduler.schedule())
    first.drafts, second.drafts = [7, 8, 9], [5, 6, 7]
    scheduler.add(request("c", 2))
    chunks = scheduler.schedule()
    assert [(c.length, c.drafts, c.rows) for c in chunks] == [(1, (7, 8, 9), 4), (1, (5,), 2), (2, (), 2)]
    scheduler.advance(chunks[0], 30, accepted=2)
    assert (first.tokens[-3:], first.computed, first.drafts) == ([7, 8, 30], 6, [])
    scheduler.advance(chunks[1], 40)
    assert (second.tokens[-1], second.computed, second.drafts) == (40, 3, [])
    scheduler.pool.check()


def test_drafts_leave_every_sequence_a_page() -> None:
    scheduler = make(pages=5, budget=16)
    first, second = scheduler.add(request("a", 3)), scheduler.add(request("b", 3))
    advance(scheduler, scheduler.schedule())
    first.drafts, second.drafts = [7, 8, 9], [5, 6, 7]
    chunks = scheduler.schedule()  # both are about to fill their first page
    assert [c.drafts for c in chunks] == [(7, 8, 9), ()]
    assert (scheduler.preemptions, scheduler.pool.available) == (0, 2)


def test_drafts_that_are_wrong_are_no_part_of_a_prefix() -> None:
    scheduler = make(budget=16)
    sequence = scheduler.add(request("a", 3, max_tokens=99))
    advance(scheduler, scheduler.schedule())
    sequence.drafts = [7, 8, 9]
    (chunk,) = scheduler.schedule()
    scheduler.advance(chunk, 50)  # page 0 is full now; the drafts' rows are on the next one
    sequence.drafts = [8, 9, 10]
    (chunk,) = scheduler.schedule()
    assert chunk.start == 4
    scheduler.advance(chunk, 60, accepted=3)
    assert sequence.tokens[-5:] == [50, 8, 9, 10, 60]
    again, other = (
        scheduler.add(request("b", sequence.tokens)),
        scheduler.add(request("c", [*sequence.tokens[:4], 7, 8, 9, 1])),
    )
    starts = {chunk.sequence: chunk.start for chunk in scheduler.schedule()}
    assert (starts[again], starts[other]) == (8, 4)
