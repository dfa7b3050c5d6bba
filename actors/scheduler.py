"""Continuous batching: which tokens of which sequences run in the next step. Plain Python; it never sees a tensor.

A sequence is its tokens so far and how many of them have been computed. A step computes some of the rest, and when nothing
is left the last logits give the next token: prefill, a chunk of a prefill, and decode are one case. Tokens that were drafted
are computed behind the last one, where budget and pages are left over; those that prove right are so many tokens more.

Who owns a sequence's pages:

    waiting                none (a preempted sequence has given all of them back)
    running                `pages`, one reference each, for every token that it has; full ones are known to the pool by
                           their prefix, and those of its prompt are promised to it from the start
    finished / cancelled   none; full pages may live on in the pool as cached

Who writes a page: of a prompt's full pages the sequence that is its filler, so that a prefix that several share is computed
once, and the others wait for it; every other page its only owner.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection
from dataclasses import dataclass, field

from ..model.pages import PagePool, prefix_hashes
from .messages import GenerateRequest
from .prompt_shares import Prompt, prompt_shares
from .queue_time import QueueTime
from .step_pace import StepPace

_RESERVE_SINKS_PAGES = 8
"""Pages that every sequence fills without a preemption before one page less is kept for each: well above what an answer of chat
has of them at 32 tokens a page, so that the reserve settles where preemptions are rare."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way.

    Attributes:
        tokens: prompt and output; the first `computed` of them have their rows in the cache.
        arrival: its number among all requests.
        pages: its block table.
        hashes: of the full pages of its tokens, as far as they have been asked for.
        shareable: how many of its first pages others may hold or fill: the full ones of what it began to run with. The last
            token is always computed, a cached row has no logits.
        queued_s: when it came, by the scheduler's clock.
        begun: it has run before, here or on another router: it is not turned away for having waited.
        drafts: guesses at what comes after `tokens`.
        cached: tokens whose rows it found in pages since it was let in.
    """

    request: GenerateRequest
    tokens: list[int]
    arrival: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    shareable: int = 0
    queued_s: float = 0.0
    begun: bool = False
    drafts: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def generated(self) -> int:
        """Tokens of the answer so far, those of an earlier router included."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def remaining(self) -> int:
        """Tokens that are not computed yet; at least one, for the newest never is."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of `sequence` from `start` on; `samples` when they are its last, so that a token follows. Then `drafts`
    of what follows may be verified with them."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Tokens the step computes for it."""
        return self.length + len(self.drafts)


class Scheduler:
    """Decides each step within a token budget and the page pool.

    Decoding sequences go first, one token each; what is left of the budget is shared among prompts (`prompt_shares`). Requests
    are let in in the order they came, where their tokens find pages and every sequence can have one more, or more than one
    after preemptions. When pages run out all the same, a sequence gives its pages back and starts over later, which costs time
    but changes no token: the one that loses least by it, never the one that came first, so that each ends in its turn.

    Args:
        pool: pages; also bounds the longest sequence.
        token_budget: most tokens in one step.
        max_running: most sequences in one step.
        target_s: seconds that a step should take at most while requests are being answered: bounds prompt tokens beside
            them, and how many are answered at once. None leaves that to the two above.
        max_wait_s: seconds of steps after which a request that has not begun to run is `overdue`; None: never.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        token_budget: int,
        max_running: int,
        target_s: float | None = None,
        max_wait_s: float | None = None,
    ) -> None:
        assert token_budget >= max_running, "every running sequence must be able to decode"
        self.pool = pool
        self.token_budget = token_budget
        self.max_running = max_running
        self.max_wait_s = max_wait_s
        self.waiting: list[Sequence] = []  # in the order of arrival
        self.running: dict[Sequence, None] = {}  # in the order of admission
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.preempted_tokens = 0
        self._pace = None if target_s is None else StepPace(target_s)
        self._queue = QueueTime()
        self._filler: dict[int, Sequence] = {}  # of pages that are shareable and not filled yet
        self._reserve = 1.0  # pages that each running sequence is to find when it grows
        self._arrivals = 0
        self._admitted = self._decoding = 0  # sequences of the step that was scheduled last
        self._clock_s = (
            0.0  # stands still while no step succeeds: what is held up by lost experts is not the queue's fault
        )

    def add(self, request: GenerateRequest) -> Sequence:
        """Queue a request; whether there is room for it is decided where it comes in (`Router.submit`).

        One that another router began is like one that was preempted: its tokens are computed again, in chunks.
        """
        sequence = Sequence(
            request,
            [*request.prompt_token_ids, *request.generated_token_ids],
            self._arrivals,
            queued_s=self._clock_s,
            begun=bool(request.generated_token_ids),
        )
        self._arrivals += 1
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, cancelled or failed sequence out and give its pages back."""
        if sequence in self.running:
            del self.running[sequence]
        else:
            del self.waiting[bisect.bisect_left(self.waiting, sequence.arrival, key=_arrival)]
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, in the order of the sequences' admission; empty when there is nothing to do."""
        lengths: dict[Sequence, int] = {}
        preempted = self.preemptions
        for sequence in [s for s in self.running if s.remaining == 1]:
            # Unless it was preempted to make room for one before it.
            if sequence in self.running and self._grow(sequence, len(sequence.tokens), lengths):
                lengths[sequence] = 1
        self._admitted = 0
        if self.preemptions > preempted:
            self._reserve += 1.0
        else:
            self._reserve = max(1.0, self._reserve - 1.0 / (_RESERVE_SINKS_PAGES * self.pool.page_size))
            if self.waiting:
                self._admit_waiting()
        self._decoding = len(lengths)
        budget = self.token_budget - len(lengths)
        if lengths and self._pace is not None and (bound := self._pace.prompt_tokens(len(lengths))) is not None:
            budget = min(budget, bound)
        prompts = self._computable(lengths, budget)
        lengths |= zip(prompts, prompt_shares(list(prompts.values()), budget), strict=True)
        left = self.token_budget - sum(lengths.values())
        chunks = []
        for s in self.running:
            if length := lengths.get(s, 0):
                samples = length == s.remaining
                drafts = self._verified(s, left) if samples and s.drafts else ()
                left -= len(drafts)
                chunks.append(Chunk(s, s.computed, length, samples, drafts))
        return chunks

    def advance(self, chunk: Chunk, token: int | None, accepted: int = 0) -> None:
        """Record that `chunk` was computed and, if it sampled, that the first `accepted` of its drafts are what follows, and
        the token that came of it."""
        assert accepted <= len(chunk.drafts), (accepted, chunk.drafts)
        sequence, size = chunk.sequence, self.pool.page_size
        before = sequence.computed // size
        sequence.tokens += chunk.drafts[:accepted]
        sequence.computed = chunk.start + chunk.length + accepted
        sequence.drafts = []
        full = sequence.computed // size
        if full > before:
            self._hash(sequence, full)
            for index in range(before, full):
                page = sequence.pages[index]
                self.pool.remember(page, sequence.hashes[index])
                self._filler.pop(page, None)
        assert chunk.samples == (token is not None), "a token follows exactly the chunks that sample"
        if token is not None:
            sequence.tokens.append(token)

    def took(self, chunks: Collection[Chunk], seconds: float) -> None:
        """The step of these chunks took `seconds`, everything around it included."""
        self._clock_s += seconds
        if self.waiting:
            self._queue.observe(self._admitted, seconds)
        if self._pace is not None:
            self._pace.observe(self._decoding, sum(chunk.length for chunk in chunks) - self._decoding, seconds)

    def wait_s(self, ahead: int) -> float | None:
        """Seconds that a request with so many `ahead` of it in the queue will wait; None where that is not known."""
        return self._queue.wait_s(max(0, ahead + 1 - (self._most_running() - len(self.running))))

    def too_long(self, ahead: int) -> float | None:
        """The same where it is longer than `max_wait_s`, else None."""
        wait_s = self.wait_s(ahead)
        return None if self.max_wait_s is None or wait_s is None or wait_s <= self.max_wait_s else wait_s

    def overdue(self) -> list[Sequence]:
        """Waiting requests that have not begun to run within `max_wait_s`."""
        found: list[Sequence] = []
        if self.max_wait_s is None:
            return found
        for sequence in self.waiting:
            if sequence.begun:
                continue
            if self._clock_s - sequence.queued_s <= self.max_wait_s:
                break  # those after it came later
            found.append(sequence)
        return found

    # ---- who runs ---------------------------------------------------------------------------------------------------

    def _admit_waiting(self) -> None:
        """Let requests in, in the order they came, as long as there is room."""
        reserved = sum(self._reserved(sequence, len(sequence.pages)) for sequence in self.running)
        most = self._most_running()
        while self._admitted < len(self.waiting) and len(self.running) < most:
            sequence = self.waiting[self._admitted]
            if self.running:
                reserved += self._reserved(sequence, self._pages(len(sequence.tokens)))
            if not self._admit(sequence, reserved):
                break
            self._admitted += 1
        del self.waiting[: self._admitted]

    def _most_running(self) -> int:
        return self.max_running if self._pace is None else min(self.max_running, self._pace.sequences())

    def _admit(self, sequence: Sequence, reserve: int) -> bool:
        """Let a sequence run if the pool has pages for its tokens, and `reserve` more for those that run."""
        pool, size = self.pool, self.pool.page_size
        shareable = (len(sequence.tokens) - 1) // size
        self._hash(sequence, shareable)
        shared = pool.match(sequence.hashes[:shareable])
        wanted = self._pages(len(sequence.tokens)) - len(shared)
        if wanted + reserve > pool.available:
            pool.release(shared)
            return False
        self.running[sequence] = None
        sequence.begun = True
        sequence.pages = shared + pool.allocate(wanted)
        sequence.shareable = shareable
        for index in range(len(shared), shareable):
            page = sequence.pages[index]
            pool.promise(page, sequence.hashes[index])
            self._filler[page] = sequence
        return True

    def _reserved(self, sequence: Sequence, pages: int) -> int:
        """How many pages more than `pages` are kept for a sequence; its last token needs none."""
        request = sequence.request
        longest = len(request.prompt_token_ids) + request.sampling.max_tokens - 1
        return max(0, min(int(self._reserve), self._pages(longest) - pages))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def _grow(self, sequence: Sequence, tokens: int, lengths: dict[Sequence, int]) -> bool:
        """Give `sequence` pages for `tokens` tokens, preempting others if need be; False if it had to go itself.

        Args:
            lengths: of the step that is being scheduled; those that are preempted are taken out.
        """
        wanted = self._pages(tokens) - len(sequence.pages)
        while wanted > self.pool.available:
            victim = self._victim()
            self._preempt(victim)
            lengths.pop(victim, None)
            if victim is sequence:
                return False
        if wanted > 0:
            sequence.pages += self.pool.allocate(wanted)
        return True

    def _verified(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """As many of the sequence's drafts as `budget` and its pages allow: for drafts alone it is given pages only where every
        running sequence would still find one, so that they take nothing from anyone."""
        wanted = self._pages(len(sequence.tokens) + min(len(sequence.drafts), budget)) - len(sequence.pages)
        spare = self.pool.available - len(self.running)
        if 0 < wanted <= spare:
            sequence.pages += self.pool.allocate(wanted)
        room = len(sequence.pages) * self.pool.page_size - len(sequence.tokens)
        return tuple(sequence.drafts[: min(budget, room)])

    def _victim(self) -> Sequence:
        """Who gives its pages back: the one that loses least, of equals the latest; the one that came first never does."""
        first = min(self.running, key=_arrival)
        others = (sequence for sequence in self.running if sequence is not first)
        return min(others, key=lambda sequence: (self._loss(sequence), -sequence.arrival), default=first)

    def _loss(self, sequence: Sequence) -> int:
        """Tokens that would have to be computed again: those whose pages no other sequence keeps."""
        size = self.pool.page_size
        kept, full = 0, sequence.computed // size
        while kept < full and self.pool.shared(sequence.pages[kept]):
            kept += 1
        return sequence.computed - kept * size

    def _preempt(self, victim: Sequence) -> None:
        self.preempted_tokens += self._loss(victim)
        del self.running[victim]
        self._release(victim)
        bisect.insort(self.waiting, victim, key=_arrival)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for page in sequence.pages[: sequence.shareable]:
            if self._filler.get(page) is sequence:
                del self._filler[page]
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.shareable, sequence.cached = [], 0, 0, 0

    def _hash(self, sequence: Sequence, pages: int) -> None:
        """Have the hashes of its first `pages` full pages at hand."""
        if len(sequence.hashes) < pages:
            size = self.pool.page_size
            sequence.hashes = prefix_hashes(sequence.tokens[: pages * size], size, known=sequence.hashes)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _computable(self, decoding: Collection[Sequence], budget: int) -> dict[Sequence, Prompt]:
        """Running sequences beside those of `decoding` that can compute some of `budget` tokens now.

        In the order of arrival, where one that others wait for has the place of the earliest of them.
        """
        order: dict[Sequence, Prompt] = {}
        for sequence in sorted((s for s in self.running if s not in decoding), key=_arrival):
            while (filler := self._awaited(sequence)) is not None:
                sequence = filler  # which is on an earlier page of the same prefix: this ends
            if sequence not in order:
                order[sequence] = Prompt(sequence.remaining, self._own_run(sequence, budget))
        return order

    def _awaited(self, sequence: Sequence) -> Sequence | None:
        """Who is to fill the sequence's next page, if that is another one; pages that were filled meanwhile are taken."""
        size = self.pool.page_size
        index, within = divmod(sequence.computed, size)
        if within:
            return None
        while index < sequence.shareable and self.pool.holds(sequence.pages[index]):
            index += 1
            sequence.cached += size
            self.prefix_hit_tokens += size
        sequence.computed = index * size
        if index >= sequence.shareable:
            return None
        filler = self._filler.setdefault(sequence.pages[index], sequence)  # whoever was to fill it may be gone
        return None if filler is sequence else filler

    def _own_run(self, sequence: Sequence, budget: int) -> int:
        """How many of the next `budget` tokens are the sequence's to compute: up to a page that another fills or has filled."""
        size = self.pool.page_size
        end = min(sequence.computed + budget, len(sequence.tokens))
        for index in range(sequence.computed // size, min(sequence.shareable, -(-end // size))):
            page = sequence.pages[index]
            if self.pool.holds(page) or self._filler.setdefault(page, sequence) is not sequence:
                return index * size - sequence.computed
        return end - sequence.computed


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
