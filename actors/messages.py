"""What travels between a front and a router: plain data, one message per engine step and front.

Frames between routers and expert hosts have their own small header in `moe_frames.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..model.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to be continued.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_token_ids: the whole prompt, special tokens included; at least one.
        sampling: how tokens are chosen and when generation ends.
        generated_token_ids: the answer so far, which another router gave: it is gone on with, not given again. These
            tokens count in `sampling.max_tokens` and in the positions that determine the noise, so that whoever takes
            over gives the very tokens that the first router would have given.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    generated_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own distribution (before temperature and filters)."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step produced for one request.

    Attributes:
        token_ids: the new tokens, in order; empty in a message that only ends the request.
        logprobs: one entry per new token if the request asked for them, else None.
        finish_reason: None while the request goes on; set exactly once, in its last output.
        error: what went wrong, for `finish_reason == "error"`.
        retry_after_s: set where the request was turned away because it waited for too long: it may be sent again then.
        cached_tokens: of the prompt, those that were not computed, because pages held them; set in the first output that a
            router gives. No part of the answer: outputs that differ in it alone are equal.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    retry_after_s: float | None = None
    cached_tokens: int | None = field(default=None, compare=False)


def joined(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """Outputs of one request that follow each other, as one."""
    first, last = outputs[0], outputs[-1]
    logprobs = None
    if first.logprobs is not None:
        logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    end = last.finish_reason, last.error, last.retry_after_s
    return TokenOutput(first.request_id, token_ids, logprobs, *end, first.cached_tokens)


@dataclass(frozen=True, slots=True)
class RouterStats:
    """One router's counters and gauges, as `/metrics` and `moray status` report them. Counters only ever grow.

    Attributes:
        pages_*: KV pages; free + cached + in use == total at all times.
        prompt_tokens: computed, those of preempted requests again.
        prefix_hit_tokens: not computed, because pages held them.
        preempted_tokens: computed for requests that had to give their pages up.
        requests_refused: too much was waiting when they came, or they waited for too long.
        drafted_tokens: tokens that were drafted and verified; accepted_tokens: those of them that were right.
        unreachable_experts: (layer, expert) pairs with no reachable replica; 0 when healthy.
        resent_shares: work that was sent to another replica because its host was lost.
        hedged_shares: work that was sent to another replica because its host was late; either answer is taken.
        fenced_hosts: hosts that were cut off because they stayed silent.
        late_hosts: hosts that owe an answer for longer than is usual for them, now.
    """

    router_id: str
    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_in_use: int = 0
    page_size: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    preempted_tokens: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0
    requests_refused: int = 0
    unreachable_experts: int = 0
    resent_shares: int = 0
    hedged_shares: int = 0
    fenced_hosts: int = 0
    late_hosts: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens that were not computed, because pages held them; 0 before any prompt."""
        return self.prefix_hit_tokens / max(1, self.prefix_hit_tokens + self.prompt_tokens)


Health = Literal["starting", "ok", "degraded", "unavailable"]


ProcessState = Literal["starting", "ready", "stuck", "leaving", "standby", "dead"]


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One expert host or router, or the controller, as `moray status` lists it.

    Attributes:
        state: `stuck` does not answer, though it has not ended; `leaving` takes no new work; `standby` is warm and waits to
            become an expert host.
        actor: name of its Ray actor.
        data_bytes_read, header_bytes_read: from the checkpoint: of tensors, and of headers and index to find them.
        data_bytes_copied: of tensors that came from other hosts instead, as many as reading them would have been.
        instructions: of the CPU, that it computes with, such as "avx2", or "torch avx2"; "" on a GPU, and before it has said.
    """

    id: str
    role: Literal["expert_host", "router", "controller"]
    pid: int
    node: str
    state: ProcessState
    detail: str = ""
    actor: str = ""
    data_bytes_read: int = 0
    header_bytes_read: int = 0
    data_bytes_copied: int = 0
    instructions: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the cluster; the log has the same as one line.

    Attributes:
        at: seconds since the Unix epoch, when it was over.
        what: kind, e.g. `restored` or `changed`.
        subject: the process it is about, or the placement epoch.
        seconds: how long it took; 0 where it took no time.
        detail: the rest, for people.
    """

    at: float
    what: str
    subject: str
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster at one moment.

    Attributes:
        epoch: of the placement table.
        min_replicas: copies of each expert that the deployment asks for.
        missing_replicas: (layer, expert) pairs that have fewer live replicas than that.
        balance: mean over maximum of the hosts' measured loads, averaged over layers; 1 where none was measured.
        events: the last ones, oldest first.
    """

    model: str
    epoch: int
    health: Health
    reason: str
    processes: list[ProcessStatus]
    routers: list[RouterStats]
    min_replicas: int = 1
    missing_replicas: int = 0
    balance: float = 1.0
    events: list[Event] = field(default_factory=list)
