"""Drafting in a router's steps: what each step says of the drafts before it, and what the MTP layer drafts for the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf

import torch

from ..configs.errors import ExpertsUnavailableError
from ..kernels.attention_plan import Segment
from ..kernels.sampling import NOT_FINITE, sample
from ..model.draft_layer import DraftBatch, DraftLayer
from .draft_policy import DraftWhilePaid
from .scheduler import Chunk, Sequence
from .step_tensors import Outcome, row_sampling

logger = logging.getLogger("moray.router")


class Drafter:
    """Keeps the MTP layer's cache in step with the model's, and gives sequences their drafts.

    Args:
        layer: makes them.
        tokens: most drafts for one sequence and step.
        max_context: longest sequence.
        policy: says when; None for always.
    """

    def __init__(self, layer: DraftLayer, *, tokens: int, max_context: int, policy: DraftWhilePaid | None) -> None:
        self.drafted = 0
        self.accepted = 0
        self._layer = layer
        self._tokens = tokens
        self._max_context = max_context
        self._policy = policy

    def after_step(
        self,
        chunks: SequenceOf[Chunk],
        found: SequenceOf[Outcome],
        segments: SequenceOf[Segment],
        hidden_states: torch.Tensor,
        *,
        started: float,
    ) -> None:
        """Fill the layer's cache for what a step computed, and draft for the sequences that go on.

        Args:
            chunks: of the step, already advanced by `found`; sequences that have ended may be among them.
            found: what the step said of each.
            segments: where each was in the step, with the pages it had.
            hidden_states: [T, H] of the step.
            started: when the step began, by `time.perf_counter`.
        """
        going = [_goes_on(outcome) for outcome in found]
        drafting = any(going) and (self._policy is None or self._policy.wanted(sum(going)))
        rows: list[int] = []
        next_ids: list[int] = []
        places, wanted, sequences = [], [], []
        verified = 0
        for chunk, outcome, segment, goes_on in zip(chunks, found, segments, going, strict=True):
            accepted = max(0, len(outcome.tokens) - 1)
            self.drafted += len(chunk.drafts)
            self.accepted += accepted
            verified += bool(chunk.drafts)
            if NOT_FINITE in outcome.tokens:
                continue
            count = chunk.length + accepted
            places.append(Segment(len(rows), count, chunk.start, segment.block_table))
            rows += range(segment.start, segment.start + count)
            next_ids += chunk.sequence.tokens[chunk.start + 1 : chunk.start + count + 1]
            wanted.append(self._wanted(chunk.sequence) if drafting and goes_on else 0)
            sequences.append(chunk.sequence)
        if rows:
            self._draft(hidden_states, DraftBatch(rows, next_ids, places, wanted), sequences)
        if self._policy is not None and all(chunk.length == 1 and chunk.samples for chunk in chunks):
            with_drafts = verified == len(chunks) and all(wanted)
            if with_drafts or not (verified or drafting):
                new = sum(len(outcome.tokens) for outcome in found)
                seconds = time.perf_counter() - started
                self._policy.measured(len(chunks), drafted=with_drafts, seconds=seconds, tokens=new)

    def _wanted(self, sequence: Sequence) -> int:
        """Drafts that could still be of use: a step with so many gives one token more."""
        left = sequence.request.sampling.max_tokens - sequence.generated
        return min(self._tokens, left - 1, self._max_context - len(sequence.tokens) - 1)

    def _draft(self, hidden_states: torch.Tensor, batch: DraftBatch, sequences: SequenceOf[Sequence]) -> None:
        def choose(going: SequenceOf[int], logits: torch.Tensor, number: int) -> list[int]:
            # With the very noise that the model's own choice will have: the two agree as often as their logits let them.
            return sample(logits, [row_sampling(sequences[index], number) for index in going])

        try:
            drafts = self._layer.draft(hidden_states, batch, choose)
        except ExpertsUnavailableError as error:
            # The next step will wait for them if it has to; rows that are missing in the layer's cache only cost drafts.
            logger.info("no drafts for this step: %s", error)
            return
        for sequence, tokens in zip(sequences, drafts, strict=True):
            sequence.drafts = tokens


def _goes_on(outcome: Outcome) -> bool:
    """Whether the next step decodes the sequence, if nothing comes between."""
    return bool(outcome.tokens) and outcome.finish_reason is None and NOT_FINITE not in outcome.tokens
