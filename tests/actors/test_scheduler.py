"""The scheduler alone: no tensors, no model. A step "computes" by writing to every row of the cache what it stands for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.messages import GenerateRequest
from moray.actors.scheduler import Chunk, Scheduler, Sequence
from moray.model.pages import PagePool
from moray.model.sampling import SamplingParams

PAGE = 4


class Cache(Scheduler):
    """A scheduler with the KV cache that its chunks are computed into.

    Attributes:
        rows: by page and place in it, what stands there: a hash of all tokens up to that one.
        computed: tokens so far.
    """

    def __init__(self, pages: int, *, token_budget: int, max_running: int) -> None:
        super().__init__(PagePool(pages, PAGE), token_budget=token_budget, max_running=max_running)
        self.rows: dict[tuple[int, int], int] = {}
        self.computed = 0

    def compute(self, chunks: SequenceOf[Chunk]) -> None:
        """Every chunk reads all rows before it, none of which is written in this step, and writes its own."""
        written: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            prefix = 0
            for position, token in enumerate(chunk.sequence.tokens[: chunk.start + chunk.length]):
                prefix = hash((prefix, token))
                row = (chunk.sequence.pages[position // PAGE], position % PAGE)
                if position >= chunk.start:
                    assert row not in written, "no two sequences write to one row"
                    written[row] = prefix
                else:
                    assert self.rows[row] == prefix, "a row is read that does not hold what it should"
            self.computed += chunk.length
        self.rows |= written


def make(pages: int = 64, budget: int = 16, running: int = 8) -> Cache:
    return Cache(pages, token_budget=budget, max_running=running)


def request(name: str, prompt: int | SequenceOf[int], max_tokens: int = 8) -> GenerateRequest:
    """A request; a prompt given as a length is like no other request's."""
    tokens = (
        [zlib.crc32(f"{name} {i}".encode()) % 50_000 for i in range(prompt)]
        if isinstance(prompt, int)
        else list(prompt)
    )
    return GenerateRequest(name, tokens, SamplingParams(max_tokens))


def advance(scheduler: Cache, chunks: list[Chunk]) -> None:
    scheduler.compute(chunks)
    for chunk in chunks:
        sequence = chunk.sequence
        scheduler.advance(chunk, 1000 + len(sequence.tokens) if chunk.samples else None)
        if sequence.generated >= sequence.request.sampling.max_tokens:
            scheduler.remove(sequence)


def step(scheduler: Cache) -> list[tuple[str, int, int]]:
    """One step; (request, start, length) of each chunk."""
    chunks = scheduler.schedule()
    check(scheduler, chunks)
    advance(scheduler, chunks)
    scheduler.pool.check()
    return [(chunk.sequence.request.request_id, chunk.start, chunk.length) for chunk in chunks]


def check(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """What holds for every schedule."""
    pool = scheduler.pool
    pool.check()
    assert sum(chunk.length for chunk in chunks) <= scheduler.token_budget
    assert len(scheduler.running) <= scheduler.max_running
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks), "a sequence has one chunk a step"
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence in scheduler.running
        assert chunk.length > 0
        assert chunk.start == sequence.computed
        assert chunk.samples == (chunk.start + chunk.length == len(sequence.tokens))
        assert len(sequence.pages) * PAGE >= chunk.start + chunk.length, "every token has a place in the cache"
    for sequence in scheduler.waiting:
        assert (sequence.pages, sequence.computed) == ([], 0), "who waits holds nothing"
    arrivals = [sequence.arrival for sequence in scheduler.waiting]
    assert arrivals == sorted(arrivals)
    assert not scheduler._filler.keys() - {page for s in scheduler.running for page in s.pages}
    assert all(sequence in scheduler.running for sequence in scheduler._filler.values())
    held = {page for sequence in scheduler.running for page in sequence.pages}
    assert pool.in_use == len(held)


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


@dataclass
class Simulation:
    """Random traffic against a tiny pool that holds exactly one longest sequence, or little more."""

    scheduler: Cache
    context: int
    ended: set[str] = field(default_factory=set)
    alive: dict[str, Sequence] = field(default_factory=dict)

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        check(self.scheduler, chunks)
        assert chunks or not self.alive, f"deadlock: {len(self.alive)} requests, nothing runs"
        oldest = min((s for s in self.alive.values()), key=lambda s: int(s.request.request_id), default=None)
        assert oldest is None or any(self.moves(oldest, c) for c in chunks), "the oldest request moves in every step"
        self.scheduler.compute(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            # Few token values, so that answers collide and pages written by generation are matched too.
            self.scheduler.advance(chunk, len(sequence.tokens) % 2 if chunk.samples else None)
            if sequence.generated >= sequence.request.sampling.max_tokens:
                self.end(sequence)
        self.scheduler.pool.check()

    def moves(self, oldest: Sequence, chunk: Chunk) -> bool:
        """Whether the chunk is its own, or computes a page that it waits for."""
        first, last = chunk.start // PAGE, (chunk.start + chunk.length - 1) // PAGE
        awaited = oldest.pages[oldest.computed // PAGE] if oldest.pages else None
        return chunk.sequence is oldest or awaited in chunk.sequence.pages[first : last + 1]

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        name = sequence.request.request_id
        del self.alive[name]
        self.ended.add(name)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_traffic_never_stalls_or_leaks(data: st.DataObject) -> None:
    pages = data.draw(st.integers(2, 12), label="pages")
    context = data.draw(st.integers(2, pages * PAGE), label="context")
    running = data.draw(st.integers(1, 6), label="max_running")
    budget = data.draw(st.integers(running, 24), label="token_budget")
    simulation = Simulation(Cache(pages, token_budget=budget, max_running=running), context)
    actions = data.draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("arrive"), st.integers(1, context - 1), st.integers(1, context), st.integers(0, 2)),
                st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0), st.just(0)),
                st.tuples(st.just("step"), st.integers(1, 6), st.just(0), st.just(0)),
                st.tuples(st.just("failed step"), st.just(0), st.just(0), st.just(0)),
            ),
            max_size=40,
        ),
        label="actions",
    )
    arrived = 0
    for kind, first, second, third in actions:
        if kind == "arrive":
            # Prompts of few kinds share prefixes. A sequence's last token is never cached, so the context bounds it all.
            prompt = [(i // 3 + third) % 3 for i in range(first)]
            made = GenerateRequest(str(arrived), prompt, SamplingParams(min(second, context - first)))
            simulation.alive[str(arrived)] = simulation.scheduler.add(made)
            arrived += 1
        elif kind == "cancel" and simulation.alive:
            names = sorted(simulation.alive)
            simulation.end(simulation.alive[names[first % len(names)]])
        elif kind == "failed step":
            check(simulation.scheduler, simulation.scheduler.schedule())
        else:
            for _ in range(first):
                simulation.step()
    for _ in range(100 * (arrived + 1)):
        if not simulation.alive:
            break
        simulation.step()
    assert not simulation.alive, "not every request ended"
    assert simulation.ended == {str(i) for i in range(arrived)}
    pool = simulation.scheduler.pool
    assert (pool.in_use, pool.free + pool.cached) == (0, pool.total)
    assert not simulation.scheduler.running
    assert not simulation.scheduler.waiting


# ---- drafts ----------------------------------------------------------------------------------------------------------


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
