"""Between the scheduler's chunks and the model's tensors: what goes into a step, and what its logits say for each sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from ..kernels.mla import Segment
from ..kernels.sampling import RowSampling, sample
from ..model.transformer import ForwardBatch
from .messages import FinishReason, TokenLogprobs
from .scheduler import Chunk, Sequence

Describe = Callable[[int], TokenLogprobs]
"""Gives the log-probabilities beside the token that was chosen."""


def forward_batch(chunks: SequenceOf[Chunk]) -> ForwardBatch:
    """The chunks' tokens one after the other, with a row of logits for each chunk that ends in a new token."""
    token_ids: list[int] = []
    segments, sample_rows = [], []
    for chunk in chunks:
        segments.append(Segment(len(token_ids), chunk.length, chunk.start, chunk.sequence.pages))
        token_ids += chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]
        if chunk.samples:
            sample_rows.append(len(token_ids) - 1)
    return ForwardBatch(token_ids, segments, sample_rows)


def chosen_tokens(chunks: SequenceOf[Chunk], logits: torch.Tensor) -> list[tuple[int | None, Describe | None]]:
    """For each chunk the token that follows it, or None where it does not reach the end of what is known.

    Args:
        logits: [rows, vocabulary], the rows in the order of the chunks that have one.

    Returns:
        The token (`NOT_FINITE` if its logits hold a NaN or an infinity), and what gives its log-probabilities if the request
        asked for them.
    """
    sequences = [chunk.sequence for chunk in chunks if chunk.samples]
    if not sequences:
        return [(None, None)] * len(chunks)
    tokens = iter(sample(logits, [_row_sampling(sequence) for sequence in sequences]))
    describers = iter([_describer(row, sequence) for row, sequence in zip(logits, sequences, strict=True)])
    return [(next(tokens), next(describers)) if chunk.samples else (None, None) for chunk in chunks]


def finish_reason(sequence: Sequence, token: int, max_context: int) -> FinishReason | None:
    """Why a sequence ends with `token`, its newest; None if it goes on."""
    sampling = sequence.request.sampling
    if token in sampling.stop_token_ids:
        return "stop"
    if sequence.generated >= sampling.max_tokens or len(sequence.tokens) >= max_context:
        return "length"
    return None


def _row_sampling(sequence: Sequence) -> RowSampling:
    s = sequence.request.sampling
    return RowSampling(s.temperature, s.top_k, s.top_p, s.min_p, s.seed, len(sequence.tokens))


def _describer(row: torch.Tensor, sequence: Sequence) -> Describe | None:
    count = sequence.request.sampling.logprobs
    if count is None:
        return None
    distribution = row.log_softmax(-1)
    top = distribution.topk(min(count, row.shape[0]))
    return lambda token: TokenLogprobs(float(distribution[token]), top.indices.tolist(), top.values.tolist())
