"""The scheduler alone: no tensors, no model. A step "computes" by advancing every chunk."""

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


def make(pages: int = 64, budget: int = 16, running: int = 8) -> Scheduler:
    return Scheduler(PagePool(pages, PAGE), token_budget=budget, max_running=running)


def request(name: str, prompt: int | SequenceOf[int], max_tokens: int = 8) -> GenerateRequest:
    """A request; a prompt given as a length is like no other request's."""
    tokens = (
        [zlib.crc32(f"{name} {i}".encode()) % 50_000 for i in range(prompt)]
        if isinstance(prompt, int)
        else list(prompt)
    )
    return GenerateRequest(name, tokens, SamplingParams(max_tokens))


def advance(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        sequence = chunk.sequence
        scheduler.advance(chunk, 1000 + len(sequence.tokens) if chunk.samples else None)
        if sequence.generated >= sequence.request.sampling.max_tokens:
            scheduler.remove(sequence)


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
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
    written = [sequence.pages[sequence.computed // PAGE :] for sequence in scheduler.running]
    flat = [page for pages in written for page in pages]
    assert len(flat) == len(set(flat)), "no two sequences write to one page"
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
    assert step(scheduler) == [("first", 4, 1), ("long", 7, 7)], "the prompt that came first takes what is left"


def test_admission_is_first_come_first_served() -> None:
    scheduler = make(pages=8, budget=64, running=8)
    scheduler.add(request("small", 8))
    scheduler.add(request("large", 28))  # 7 pages: does not fit beside the first one
    scheduler.add(request("tiny", 2))
    assert step(scheduler) == [("small", 0, 8)], "the tiny one must not overtake the large one"


def test_most_running_sequences() -> None:
    scheduler = make(running=3, budget=16)
    for name in "abcde":
        scheduler.add(request(name, 2, max_tokens=2))
    assert [name for name, _, _ in step(scheduler)] == ["a", "b", "c"]
    assert [name for name, _, _ in step(scheduler)] == ["a", "b", "c"]
    assert [name for name, _, _ in step(scheduler)] == ["d", "e"]


def test_the_latest_is_preempted_and_comes_back_first() -> None:
    scheduler = make(pages=4, budget=16)
    scheduler.add(request("old", 8, max_tokens=8))
    scheduler.add(request("new", 7, max_tokens=3))
    scheduler.add(request("newest", 1, max_tokens=1))
    assert step(scheduler) == [("old", 0, 8), ("new", 0, 7)]
    assert step(scheduler) == [("old", 8, 1)], "old needs a third page"
    assert scheduler.preemptions == 1
    assert [s.request.request_id for s in scheduler.waiting] == ["new", "newest"]
    finished = [step(scheduler) for _ in range(20)]
    assert finished[-1] == []
    assert (scheduler.pool.in_use, scheduler.waiting, scheduler.running) == (0, scheduler.waiting, [])
    assert not scheduler.waiting


def test_a_preempted_answer_keeps_its_tokens() -> None:
    """What was generated before the preemption is computed again as if it were prompt, and goes on from there."""
    scheduler = make(pages=5, budget=16)
    scheduler.add(request("old", 11, max_tokens=9))
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


def test_a_preempted_sequence_may_run_in_the_same_step() -> None:
    """Its pages go to an older prompt; what is left of the pool may still do for its own next chunk."""
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

    scheduler: Scheduler
    context: int
    ended: set[str] = field(default_factory=set)
    alive: dict[str, Sequence] = field(default_factory=dict)

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        check(self.scheduler, chunks)
        assert chunks or not self.alive, f"deadlock: {len(self.alive)} requests, nothing runs"
        oldest = min((s for s in self.alive.values()), key=lambda s: int(s.request.request_id), default=None)
        assert oldest is None or any(c.sequence is oldest for c in chunks), "the oldest request moves in every step"
        for chunk in chunks:
            sequence = chunk.sequence
            # Few token values, so that answers collide and pages written by generation are matched too.
            self.scheduler.advance(chunk, len(sequence.tokens) % 2 if chunk.samples else None)
            if sequence.generated >= sequence.request.sampling.max_tokens:
                self.end(sequence)
        self.scheduler.pool.check()

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
    simulation = Simulation(Scheduler(PagePool(pages, PAGE), token_budget=budget, max_running=running), context)
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
