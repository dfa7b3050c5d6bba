"""Between the scheduler's chunks and the model's tensors: what goes into a step, and what its logits say for each sequence."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from ..kernels.mla import Segment
from ..kernels.sampling import GREEDY, NOT_FINITE, RowSampling, sample
from ..model.transformer import ForwardBatch
from .messages import FinishReason, TokenLogprobs
from .scheduler import Chunk, Sequence


def forward_batch(chunks: SequenceOf[Chunk]) -> ForwardBatch:
    """The chunks' tokens one after the other, with rows of logits for each chunk that ends in a new token: for what follows its
    last one, and each of its drafts."""
    token_ids: list[int] = []
    segments: list[Segment] = []
    sample_rows: list[int] = []
    for chunk in chunks:
        segments.append(Segment(len(token_ids), chunk.rows, chunk.start, chunk.sequence.pages))
        token_ids += chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]
        token_ids += chunk.drafts
        if chunk.samples:
            sample_rows += range(len(token_ids) - 1 - len(chunk.drafts), len(token_ids))
    return ForwardBatch(token_ids, segments, sample_rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step says of one chunk.

    Attributes:
        tokens: the new ones, each what decoding one by one would give; none where the chunk does not reach the end of what is
            known. `NOT_FINITE`, alone, if the logits hold a NaN or an infinity.
        finish_reason: why the sequence ends with the last of them; None if it goes on.
        logprobs: of each token, if the request asked for them.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None


def outcomes(chunks: SequenceOf[Chunk], logits: torch.Tensor, max_context: int) -> list[Outcome]:
    """What follows each chunk: the token that its last logits give and, for each draft that is this token, one more.

    Args:
        logits: [rows, vocabulary], the rows in the order of the chunks that have some (`forward_batch`).
        max_context: longest sequence.
    """
    rows = [
        row_sampling(chunk.sequence, number)
        for chunk in chunks
        if chunk.samples
        for number in range(1 + len(chunk.drafts))
    ]
    chosen = sample(logits, rows) if rows else []
    found, row = [], 0
    for chunk in chunks:
        if not chunk.samples:
            found.append(Outcome())
            continue
        count = 1 + len(chunk.drafts)
        tokens, reason = _kept(chunk, chosen[row : row + count], max_context)
        found.append(Outcome(tokens, reason, _logprobs(chunk.sequence, logits, row, tokens)))
        row += count
    return found


def _kept(chunk: Chunk, chosen: SequenceOf[int], max_context: int) -> tuple[list[int], FinishReason | None]:
    """Of the tokens that the rows of a chunk give, those that decoding one by one would give too, and why it ends with them."""
    sequence, tokens = chunk.sequence, list[int]()
    for number, token in enumerate(chosen):
        if token == NOT_FINITE:
            return tokens or [token], None  # behind others: the next step will find the same, alone
        tokens.append(token)
        reason = _finish_reason(sequence, token, len(tokens), max_context)
        if reason is not None:
            return tokens, reason
        if number < len(chunk.drafts) and chunk.drafts[number] != token:
            break  # what follows was computed for another token
    return tokens, None


def finish_reason(sequence: Sequence, token: int, max_context: int) -> FinishReason | None:
    """Why a sequence ends with `token`, its newest; None if it goes on."""
    return _finish_reason(sequence, token, 0, max_context)


def _finish_reason(sequence: Sequence, token: int, more: int, max_context: int) -> FinishReason | None:
    """The same once it has `more` tokens than now."""
    sampling = sequence.request.sampling
    if token in sampling.stop_token_ids:
        return "stop"
    if sequence.generated + more >= sampling.max_tokens or len(sequence.tokens) + more >= max_context:
        return "length"
    return None


def row_sampling(sequence: Sequence, number: int = 0) -> RowSampling:
    """How the token is chosen that comes `number` tokens after a sequence's next one."""
    s = sequence.request.sampling
    if s.temperature <= 0.0:
        return GREEDY
    return RowSampling(s.temperature, s.top_k, s.top_p, s.min_p, s.seed, len(sequence.tokens) + number)


def _logprobs(
    sequence: Sequence, logits: torch.Tensor, first: int, tokens: SequenceOf[int]
) -> list[TokenLogprobs] | None:
    """Of tokens that rows of logits from the first on gave; None where the request did not ask for them."""
    count = sequence.request.sampling.logprobs
    if count is None or NOT_FINITE in tokens:
        return None
    described = []
    for row, token in zip(logits[first:], tokens, strict=False):
        distribution = row.log_softmax(-1)
        top = distribution.topk(min(count, row.shape[0]))
        described.append(TokenLogprobs(float(distribution[token]), top.indices.tolist(), top.values.tolist()))
    return described
