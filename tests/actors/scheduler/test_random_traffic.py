"""Random traffic: whatever comes, every request ends, the oldest moves in every step, and no page is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.messages import GenerateRequest
from moray.actors.scheduler import Chunk, Sequence
from moray.model.sampling import SamplingParams

from .scheduled_cache import PAGE, Cache, check


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
