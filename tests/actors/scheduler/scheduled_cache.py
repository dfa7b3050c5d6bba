"""A scheduler without tensors or a model: a step "computes" by writing to every row of the cache what it stands for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as SequenceOf

from moray.actors.messages import GenerateRequest
from moray.actors.scheduler import Chunk, Scheduler
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
