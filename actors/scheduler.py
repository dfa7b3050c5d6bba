"""Continuous batching: which tokens of which sequences run in the next step. Plain Python; it never sees a tensor.

A sequence is its tokens so far and how many of them have been computed. A step computes some of the rest, and when nothing
is left the last logits give the next token: prefill, a chunk of a prefill, and decode are one case.

Who owns a sequence's pages:

    waiting                none (a preempted sequence has given all of them back)
    running                `pages`, one reference each; full ones are also known to the pool by their prefix
    finished / cancelled   none; full pages may live on in the pool as cached
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..model.pages import PagePool, prefix_hashes
from .messages import GenerateRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. `tokens` are prompt and output; the first `computed` of them have their rows in the cache."""

    request: GenerateRequest
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far, those of an earlier router included."""
        return len(self.tokens) - len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of `sequence` from `start` on; `samples` when they are its last, so that a token follows."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


class Scheduler:
    """Decides each step within a token budget and the page pool.

    Decoding sequences go first, one token each, so that a long prompt delays them by at most one chunk; then prompts in
    the order they came. When pages run out the sequence that came last gives its pages back and starts over later, which
    costs time but changes no token.

    Args:
        pool: pages; also bounds the longest sequence.
        token_budget: most tokens in one step.
        max_running: most sequences in one step.
    """

    def __init__(self, pool: PagePool, *, token_budget: int, max_running: int) -> None:
        assert token_budget >= max_running, "every running sequence must be able to decode"
        self.pool = pool
        self.token_budget = token_budget
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, request: GenerateRequest) -> Sequence:
        """Queue a request; whether there is room for it is decided where it comes in (`Router.submit`).

        One that another router began is like one that was preempted: its tokens are computed again, in chunks.
        """
        sequence = Sequence(request, [*request.prompt_token_ids, *request.generated_token_ids])
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, cancelled or failed sequence out and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, in the order of the sequences' arrival; empty when there is nothing to do."""
        budget = self.token_budget
        lengths: dict[int, int] = {}
        decoding = [s for s in self.running if len(s.tokens) - s.computed == 1]
        prefilling = [s for s in self.running if len(s.tokens) - s.computed > 1]
        for sequence in decoding + prefilling:
            if sequence not in self.running:
                continue  # preempted to make room for one before it
            length = min(len(sequence.tokens) - sequence.computed, budget)
            if length and self._grow(sequence, sequence.computed + length):
                lengths[id(sequence)] = length
                budget -= length
        while self.waiting and budget and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            length = self._admit(sequence, budget)
            if not length:
                break
            lengths[id(sequence)] = length
            budget -= length
        return [
            Chunk(s, s.computed, lengths[id(s)], s.computed + lengths[id(s)] == len(s.tokens))
            for s in self.running
            if id(s) in lengths
        ]

    def advance(self, chunk: Chunk, token: int | None) -> None:
        """Record that `chunk` was computed and, if it sampled, the token that came of it."""
        sequence = chunk.sequence
        sequence.computed = chunk.start + chunk.length
        known = len(sequence.hashes)
        full = sequence.computed // self.pool.page_size
        sequence.hashes = prefix_hashes(
            sequence.tokens[: sequence.computed], self.pool.page_size, known=sequence.hashes
        )
        for index in range(known, full):
            self.pool.remember(sequence.pages[index], sequence.hashes[index])
        assert chunk.samples == (token is not None), "a token follows exactly the chunks that sample"
        if token is not None:
            sequence.tokens.append(token)

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Move the first waiting sequence to running if its first chunk finds pages; the chunk's length, or 0."""
        size = self.pool.page_size
        # The last token is always computed, a cached row has no logits.
        hashes = prefix_hashes(sequence.tokens[: len(sequence.tokens) - 1], size)
        shared = self.pool.match(hashes)
        computed = len(shared) * size
        length = min(len(sequence.tokens) - computed, budget)
        wanted = -(-(computed + length) // size) - len(shared)
        if wanted > self.pool.available:
            self.pool.release(shared)
            return 0
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.pages = shared + self.pool.allocate(wanted)
        sequence.hashes = hashes[: len(shared)]
        sequence.computed = computed
        self.prefix_hit_tokens += computed
        return length

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` pages for `tokens` tokens, preempting later ones if need be; False if it had to go itself."""
        wanted = -(-tokens // self.pool.page_size) - len(sequence.pages)
        while wanted > self.pool.available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if wanted > 0:
            sequence.pages += self.pool.allocate(wanted)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.hashes, sequence.computed = [], [], 0
