"""One modelled router's requests: the real scheduler and page pool decide what each step computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...actors.messages import FinishReason, GenerateRequest
from ...actors.router import RouterSettings
from ...actors.scheduler import Chunk, Scheduler
from ...actors.step_tensors import finish_reason
from ...model.pages import PagePool
from ...model.sampling import SamplingParams
from ...model.transformer import SPARED_ROWS
from .trace import Arrival

_PREFIXES_FROM = 1 << 31
"""Tokens of shared prefixes are numbered from here on, those of single requests below: no two texts are alike by chance."""


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through the cluster.

    Attributes:
        number: in the order of arrival.
        arrival: what was asked.
        at: when it came.
        first_at, last_at: when the client got its first token, and the last one so far.
        tokens: that a router has given it.
        moved: times it went on at another router.
    """

    number: int
    arrival: Arrival
    at: float
    first_at: float | None = None
    last_at: float | None = None
    tokens: int = 0
    moved: int = 0


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes; see `CostModel` for the meaning of each.

    Attributes:
        sampled_positions: of the sampled rows alone, the sum of the positions each attends to.
        sampled_longest: the most that one of them attends to.
    """

    tokens: int
    decoding: int
    sampled: int
    kv_positions: int
    kv_rows: int
    longest: int
    sampled_positions: int
    sampled_longest: int

    @classmethod
    def of_single_tokens(cls, count: int, positions: int, longest: int) -> StepWork:
        """Of `count` sequences with a token each, which attend to so many positions in all, and at most so many."""
        return cls(count, count, count, positions, positions, longest, positions, longest)

    @property
    def sampled_alone(self) -> StepWork:
        """The same for the sampled rows, without the others."""
        return self.of_single_tokens(self.sampled, self.sampled_positions, self.sampled_longest)

    @property
    def last(self) -> StepWork:
        """What the last layer computes: where many tokens are not sampled, only those that are.

        The others' keys, which it writes to the cache, are not counted: a small part of attention.
        """
        return self if self.tokens - self.sampled < SPARED_ROWS else self.sampled_alone

    def halves(self) -> tuple[StepWork, ...]:
        """As two micro-batches; one where there is only one token."""
        if self.tokens < 2:
            return (self,)
        smaller = StepWork(
            self.tokens // 2,
            self.decoding // 2,
            self.sampled // 2,
            self.kv_positions // 2,
            self.kv_rows // 2,
            self.longest,
            self.sampled_positions // 2,
            self.sampled_longest,
        )
        larger = StepWork(
            self.tokens - smaller.tokens,
            self.decoding - smaller.decoding,
            self.sampled - smaller.sampled,
            self.kv_positions - smaller.kv_positions,
            self.kv_rows - smaller.kv_rows,
            self.longest,
            self.sampled_positions - smaller.sampled_positions,
            self.sampled_longest,
        )
        return larger, smaller


@dataclass(frozen=True, slots=True)
class Output:
    """One token of one request; `reason` if it is its last."""

    request: Request
    reason: FinishReason | None


class Batches:
    """Takes requests in, says what each step computes, and gives out the tokens that come of it.

    Args:
        settings: of the router.

    Attributes:
        pool, scheduler: the real ones.
        routed_tokens: computed so far; each counts as sent to its experts in every layer, the last one included.
        steps: so far.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.pool = PagePool(settings.pages, settings.page_size)
        self.scheduler = Scheduler(
            self.pool,
            token_budget=settings.token_budget,
            max_running=settings.max_running,
            target_s=settings.target_itl_s,
            max_wait_s=settings.max_wait_s,
        )
        self._requests: dict[str, Request] = {}
        self._chunks: list[Chunk] = []
        self._routed = 0
        self._began = 0.0
        self.routed_tokens = 0
        self.steps = 0

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def full(self) -> bool:
        """Whether a request would be refused now, with 429."""
        waiting = len(self.scheduler.waiting)
        return waiting >= self._settings.max_waiting or self.scheduler.too_long(waiting) is not None

    def fits(self, arrival: Arrival) -> bool:
        """Whether prompt and answer are no longer than a request may be; else it is refused, with 400."""
        return arrival.prompt + arrival.output <= self._settings.max_context

    def add(self, request: Request) -> None:
        """Queue a request, with what it has been answered so far."""
        arrival = request.arrival
        own = request.number % _PREFIXES_FROM
        prompt = [own] * arrival.prompt
        if arrival.prefix is not None:
            prompt[: arrival.prefix_tokens] = [_PREFIXES_FROM + arrival.prefix % _PREFIXES_FROM] * arrival.prefix_tokens
        name = str(request.number)
        self._requests[name] = request
        self.scheduler.add(
            GenerateRequest(name, prompt, SamplingParams(max_tokens=arrival.output), [own] * request.tokens)
        )

    def turned_away(self) -> list[Request]:
        """Let go of the requests that have waited for too long; see `RouterSettings.max_wait_s`."""
        late = self.scheduler.overdue()
        for sequence in late:
            self.scheduler.remove(sequence)
        return [self._requests.pop(sequence.request.request_id) for sequence in late]

    def next_step(self, now: float) -> StepWork | None:
        """Schedule a step, which begins `now`; None if there is nothing to do."""
        self._began = now
        self._chunks = self.scheduler.schedule()
        if not self._chunks:
            return None
        work = self._work()
        self._routed = work.tokens
        return work

    def _work(self) -> StepWork:
        tokens = decoding = sampled = positions = rows = longest = sampled_positions = sampled_longest = 0
        for chunk in self._chunks:
            end = chunk.start + chunk.length
            request = self._requests[chunk.sequence.request.request_id]
            # What came with its pages is not computed, unless the request has moved and left them behind.
            begin = chunk.start if request.moved else min(end, max(chunk.start, request.arrival.cached))
            count = end - begin
            if not count:
                continue
            tokens += count
            decoding += count == 1
            if chunk.samples:
                sampled += 1
                sampled_positions += end
                sampled_longest = max(sampled_longest, end)
            positions += count * begin + count * (count + 1) // 2
            rows += end
            longest = max(longest, end)
        return StepWork(tokens, decoding, sampled, positions, rows, longest, sampled_positions, sampled_longest)

    def finish_step(self, now: float) -> list[Output]:
        """The step was computed by `now`: its tokens, in the order of arrival."""
        outputs = []
        self.routed_tokens += self._routed
        self.steps += 1
        for chunk in self._chunks:
            sequence = chunk.sequence
            name = sequence.request.request_id
            request = self._requests[name]
            self.scheduler.advance(chunk, request.number % _PREFIXES_FROM if chunk.samples else None)
            if not chunk.samples:
                continue
            request.tokens += 1
            reason = finish_reason(sequence, sequence.tokens[-1], self._settings.max_context)
            if reason is not None:
                del self._requests[name]
                self.scheduler.remove(sequence)
            outputs.append(Output(request, reason))
        self.scheduler.took(self._chunks, now - self._began)
        self._chunks = []
        return outputs

    def drop_all(self) -> list[Request]:
        """Let go of every request: those that have not ended."""
        requests = list(self._requests.values())
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.remove(sequence)
        self._requests.clear()
        self._chunks = []
        return requests

    def check(self) -> None:
        """Assert what holds of pages at all times."""
        self.pool.check()


def kv_use(batches: Sequence[Batches]) -> float:
    """Share of all KV pages that running requests hold."""
    pages = sum(one.pool.total for one in batches)
    return sum(one.pool.in_use for one in batches) / pages if pages else 0.0
