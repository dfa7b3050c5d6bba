"""Router: takes requests, runs steps of the model over all of them, and hands out what each step produced."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..configs.errors import ExpertsUnavailableError, QueueFullError
from ..kernels.sampling import NOT_FINITE
from ..model.compute import Compute
from ..model.config import ModelConfig
from ..model.draft_layer import DraftLayer
from ..model.pages import PagePool
from ..model.transformer import Transformer
from ..model.weights import RouterWeights
from .draft_policy import DraftWhilePaid
from .drafting import Drafter
from .expert_dispatch import ExpertDispatch
from .links.base import Link
from .messages import FinishReason, GenerateRequest, RouterStats, TokenOutput
from .placement_table import PlacementTable
from .request_checks import check_request
from .router_inbox import RouterInbox, Sink
from .scheduler import Chunk, Scheduler, Sequence
from .step_tensors import Outcome, forward_batch, outcomes

logger = logging.getLogger("moray.router")

_IDLE_CHECK_S = 0.2
"""How often an idle router looks whether its expert hosts still live, and late ones have answered."""

_RETRY_PAUSE_S = 0.02
"""Pause between attempts at a step while experts are missing: far below what a restore takes."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Limits of one router.

    Attributes:
        page_size: positions a KV page; pages: how many there are.
        max_context: longest prompt plus answer, in tokens.
        token_budget: most tokens a step; max_running: most sequences a step; max_waiting: most requests in the queue.
        restore_timeout_s: how long a step waits for missing experts before its requests fail.
        target_itl_s, max_wait_s: see `Routers` of the deployment; None: no bound.
        draft_tokens: most tokens that the MTP layer drafts for a sequence and step; needs one where not 0.
        draft_always: draft even where it takes longer.
        shares_cores: hosts on this machine compute on the cores that a router on CPUs computes on, each in its turn.
    """

    page_size: int
    pages: int
    max_context: int
    token_budget: int
    max_running: int
    max_waiting: int
    restore_timeout_s: float
    target_itl_s: float | None = None
    max_wait_s: float | None = None
    draft_tokens: int = 0
    draft_always: bool = False
    shares_cores: bool = False


class Router:
    """Holds attention, gate, shared experts and KV cache; sends tokens to expert hosts through `dispatch`.

    Requests come from any thread through `submit` and `cancel`; steps run in one: `start`'s thread, or the caller of
    `step` in local mode. Every request ends exactly once, with a `finish_reason` given to its sink.
    """

    def __init__(
        self,
        router_id: str,
        config: ModelConfig,
        weights: RouterWeights,
        dispatch: ExpertDispatch,
        settings: RouterSettings,
        *,
        compute: Compute,
    ) -> None:
        self.router_id = router_id
        self.config = config
        self.settings = settings
        self.dispatch = dispatch
        self.pool = PagePool(settings.pages, settings.page_size)
        self.scheduler = Scheduler(
            self.pool,
            token_budget=settings.token_budget,
            max_running=settings.max_running,
            target_s=settings.target_itl_s,
            max_wait_s=settings.max_wait_s,
        )
        self.model = Transformer(
            config,
            weights,
            dispatch,
            pages=settings.pages,
            page_size=settings.page_size,
            max_context=settings.max_context,
            compute=compute,
            elsewhere=lambda: dispatch.elsewhere or not (compute.packed and settings.shares_cores),
            run_layers=dispatch.run_layers if compute.packed else None,
        )
        self._drafter: Drafter | None = None
        if settings.draft_tokens:
            assert weights.draft is not None, "drafting needs the MTP layer's weights"
            self._drafter = Drafter(
                DraftLayer(self.model, weights.draft, dispatch),
                tokens=settings.draft_tokens,
                max_context=settings.max_context,
                policy=None if settings.draft_always else DraftWhilePaid(),
            )
        self._sequences: dict[str, tuple[Sequence, Sink]] = {}
        self._inbox = RouterInbox()
        self._thread: threading.Thread | None = None
        self._counts = dict.fromkeys(
            ("steps", "prompt", "generated", "finished", "cancelled", "failed", "refused", "turned away"), 0
        )
        self._missing_since: float | None = None
        self._step_ended: float | None = None  # where the last turn was a step: time after it is the next one's

    # ---- called from any thread -------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request; its outputs go to `sink`, from the router's thread.

        Raises:
            QueueFullError, ContextTooLongError, RequestError: it cannot be taken; nothing will reach the sink.
            RouterLostError: the router has stopped.
        """
        check_request(request, vocab_size=self.config.vocab_size, max_context=self.settings.max_context)
        self._inbox.submit(request, sink, self._check_room)

    def cancel(self, request_id: str) -> None:
        """End a request early and free its pages; unknown and finished ones are left alone."""
        self._inbox.cancel(request_id)

    def set_link(self, host: str, link: Link) -> None:
        """Use `link` for `host` from the next step on; where there will be none, it is closed."""
        self._inbox.put_link(host, link)

    @property
    def unlinked(self) -> list[str]:
        """Hosts of the placement that there is no link to, and none on its way through `set_link`."""
        coming = self._inbox.linked_hosts
        return [host for host in self.dispatch.unlinked if host not in coming]

    def adopt(self, table: PlacementTable, links: Mapping[str, Link]) -> threading.Event:
        """Use another placement from the next step on, with `links` to its new hosts; the event is set once it is in use.

        Where there will be no next step, the links are closed.
        """
        return self._inbox.put_table(table, dict(links))

    @property
    def closed(self) -> str | None:
        """Why the router has ended; None while it runs. Set before the requests that are left hear of it."""
        return self._inbox.closed

    @property
    def busy(self) -> bool:
        """Whether any request has not ended yet."""
        return bool(self._inbox.in_flight)

    @property
    def has_room(self) -> bool:
        """Whether `submit` would take a request now."""
        return self._inbox.waiting < self.settings.max_waiting

    def _check_room(self, waiting: int) -> None:
        wait_s = self.scheduler.wait_s(waiting)
        if waiting >= self.settings.max_waiting:
            problem = f"{waiting} requests are waiting already, the limit is {self.settings.max_waiting}"
        elif self.scheduler.too_long(waiting) is not None:
            problem = f"{waiting} requests are waiting, so that this one would for {wait_s:.0f} s"
            problem += f"; the limit is {self.settings.max_wait_s:g} s"
        else:
            return
        self._counts["refused"] += 1
        raise QueueFullError(
            problem, retry_after_s=max(1.0, waiting / self.settings.max_running if wait_s is None else wait_s)
        )

    def stats(self) -> RouterStats:
        """Counters and gauges now."""
        counts = dict(self._counts)
        return RouterStats(
            router_id=self.router_id,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + self._inbox.untaken,
            pages_total=self.pool.total,
            pages_free=self.pool.free,
            pages_cached=self.pool.cached,
            pages_in_use=self.pool.in_use,
            page_size=self.pool.page_size,
            steps=counts["steps"],
            prompt_tokens=counts["prompt"],
            generated_tokens=counts["generated"],
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            drafted_tokens=0 if self._drafter is None else self._drafter.drafted,
            accepted_tokens=0 if self._drafter is None else self._drafter.accepted,
            preemptions=self.scheduler.preemptions,
            preempted_tokens=self.scheduler.preempted_tokens,
            requests_finished=counts["finished"],
            requests_cancelled=counts["cancelled"],
            requests_failed=counts["failed"],
            requests_refused=counts["refused"] + counts["turned away"],
            unreachable_experts=self.dispatch.missing,
            resent_shares=self.dispatch.resent_shares,
            hedged_shares=self.dispatch.hedged_shares,
            fenced_hosts=self.dispatch.fenced_hosts,
            late_hosts=self.dispatch.late_hosts,
            broken_links=list(self.dispatch.broken.values()),
        )

    def start(self, *, on_failure: Callable[[], None] | None = None) -> None:
        """Run steps in a thread of the router's own until `stop`; `on_failure` is called if that thread fails before."""
        assert self._thread is None, "already started"
        self._thread = threading.Thread(target=self._loop, args=(on_failure,), name=self.router_id, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Fail what is still running, close the links, end the thread. Idempotent."""
        self._inbox.stop()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                logger.error("%s: did not stop within %.0f s", self.router_id, timeout_s)
        else:
            self._shut("the router is shutting down")
        self.dispatch.close()
        self._inbox.close_links()

    # ---- the router's own thread ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take in what has arrived and run one step; False if there was nothing to run."""
        began = time.perf_counter() if self._step_ended is None else self._step_ended
        self._step_ended = None
        self._take_in()
        self._turn_away()
        chunks = self.scheduler.schedule()
        if not chunks:
            self._missing_since = None
            return False
        started, batch = time.perf_counter(), forward_batch(chunks)
        try:
            # Drafts are made of every row.
            every = None if self._drafter is None else self.model.hidden_states(batch)
            sampled = self.model.sampled_states(batch) if every is None else every[list(batch.sample_rows)]
        except ExpertsUnavailableError as error:
            self._experts_missing(error)
            return True
        self._missing_since = None
        logits = self.model.logits(sampled)
        found = outcomes(chunks, logits, self.settings.max_context)
        self._postprocess(chunks, found)
        if self._drafter is not None and every is not None:  # once the tokens are on their way
            self._drafter.after_step(chunks, found, batch.segments, every, started=started)
        self._step_ended = time.perf_counter()
        self.scheduler.took(chunks, self._step_ended - began)
        return True

    def _loop(self, on_failure: Callable[[], None] | None) -> None:
        try:
            while not self._inbox.stopping:
                if not self.step():
                    self.dispatch.check()
                    self._inbox.wait(_IDLE_CHECK_S)
        except Exception as error:
            # Whatever broke, the requests must hear of it; the process is of no use any more.
            logger.exception("%s: the step loop failed", self.router_id)
            self._shut(f"{self.router_id} failed: {type(error).__name__}: {error}")
            if on_failure is not None:
                on_failure()
        else:
            self._shut("the router is shutting down")

    def _take_in(self) -> None:
        arrivals = self._inbox.take()
        for host, link in arrivals.links:
            self.dispatch.set_link(host, link)
        for table, links, adopted in arrivals.tables:
            self.dispatch.adopt(table, links)
            adopted.set()
        for item in arrivals.requests:
            if isinstance(item, str):
                self._finish(item, "cancelled")
            else:
                request, sink = item
                self._sequences[request.request_id] = (self.scheduler.add(request), sink)
        self._inbox.now_waiting(len(self.scheduler.waiting))

    def _turn_away(self) -> None:
        """End what has waited for too long without a token: whoever sent it can try elsewhere, or later."""
        for sequence in self.scheduler.overdue():
            self._counts["turned away"] += 1
            sequence, sink = self._forget(sequence.request.request_id)
            self.scheduler.remove(sequence)
            error = f"the request waited for {self.settings.max_wait_s:g} s, and there is no room for it yet"
            retry_after_s = max(1.0, self.scheduler.wait_s(len(self.scheduler.waiting)) or 0.0)
            sink(
                [
                    TokenOutput(
                        sequence.request.request_id, finish_reason="error", error=error, retry_after_s=retry_after_s
                    )
                ]
            )

    def _postprocess(self, chunks: list[Chunk], found: list[Outcome]) -> None:
        outputs: dict[Sink, list[TokenOutput]] = {}
        for chunk, outcome in zip(chunks, found, strict=True):
            sequence, tokens = chunk.sequence, outcome.tokens
            request = sequence.request
            prompt_left = len(request.prompt_token_ids) - chunk.start
            self._counts["prompt"] += max(0, min(chunk.length, prompt_left))
            if NOT_FINITE in tokens:
                self._finish(
                    request.request_id, "error", "the model's logits for this request hold a NaN or an infinity"
                )
                continue
            if not tokens:
                self.scheduler.advance(chunk, None)
                continue
            self.scheduler.advance(chunk, tokens[-1], accepted=len(tokens) - 1)
            self._counts["generated"] += len(tokens)
            _, sink = self._sequences[request.request_id]
            first = sequence.generated == len(request.generated_token_ids) + len(tokens)
            cached = min(sequence.cached, len(request.prompt_token_ids)) if first else None
            outputs.setdefault(sink, []).append(
                TokenOutput(request.request_id, tokens, outcome.logprobs, outcome.finish_reason, cached_tokens=cached)
            )
            if outcome.finish_reason is not None:
                self._counts["finished"] += 1
                self._forget(request.request_id)
                self.scheduler.remove(sequence)
        self._counts["steps"] += 1
        self._inbox.now_waiting(len(self.scheduler.waiting))
        for sink, batch in outputs.items():
            sink(batch)

    def _experts_missing(self, error: ExpertsUnavailableError) -> None:
        """Keep the step for another try while the experts may come back; fail its requests when that takes too long."""
        now = time.monotonic()
        first = self._missing_since is None
        if self._missing_since is None:
            self._missing_since = now
            logger.warning("%s: waiting for experts: %s", self.router_id, error)
        if now - self._missing_since > self.settings.restore_timeout_s:
            self._end_all(f"{error} (waited {self.settings.restore_timeout_s:.0f} s for them to be restored)")
            self._missing_since = None
        elif self.dispatch.missing or not first:  # else other replicas can take over at once
            self._inbox.wait_for_link(_RETRY_PAUSE_S)

    def _finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        if request_id not in self._sequences:
            return
        sequence, sink = self._forget(request_id)
        self.scheduler.remove(sequence)
        self._counts["cancelled" if reason == "cancelled" else "failed"] += 1
        sink([TokenOutput(request_id, finish_reason=reason, error=error)])

    def _forget(self, request_id: str) -> tuple[Sequence, Sink]:
        self._inbox.has_ended(request_id)
        return self._sequences.pop(request_id)

    def _shut(self, reason: str) -> None:
        """Take no more requests and fail those that are here."""
        self._inbox.close(reason)
        self._end_all(reason)

    def _end_all(self, error: str) -> None:
        self._take_in()
        for request_id in list(self._sequences):
            self._finish(request_id, "error", error)
