"""The MTP layer (DeepSeek-V3 report, section 2.2, arXiv:2412.19437): from the hidden state of a position and the token after it
it guesses the token after that. A guess is only ever a draft, which the model itself then verifies.

The layer has a latent cache of its own, on the same pages: the row of position i is made of the hidden state of i, after the
final norm, and the token at i + 1. So each step fills the rows of the positions it has computed, and only those that a draft is
wanted for go through the whole layer. A page that two sequences share may hold, in its last row, what followed in the other
one; like any other row that is not what it might be, it can spoil a draft and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.attention_plan import Segment
from ..kernels.linear import linear
from .moe import Pending, RoutedExperts
from .transformer import Transformer, head_logits
from .weights import DraftWeights

Choose = Callable[[Sequence[int], torch.Tensor, int], list[int]]
"""Chooses a draft for each of these segments (by index) from logits [len(segments), V], the n-th in a row (from 0); a negative
one is none."""


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """R rows of a step whose next token is known by now.

    Attributes:
        rows: of the step's hidden states, R of them, sequence after sequence.
        next_ids: the token after each.
        segments: where they stand: one for each sequence, with `start` among the R rows.
        wanted: for each segment, how many tokens to draft after its last row; 0 only fills the cache.
    """

    rows: Sequence[int]
    next_ids: Sequence[int]
    segments: Sequence[Segment]
    wanted: Sequence[int]


class DraftLayer:
    """Drafts tokens for sequences of `model`, whose embedding, final norm, head and cache it shares.

    Args:
        model: of a configuration with a draft layer.
        weights: as `model`'s.
        routed: where the routed experts are.
    """

    def __init__(self, model: Transformer, weights: DraftWeights, routed: RoutedExperts[Pending]) -> None:
        layer = model.config.num_hidden_layers
        self.model = model
        self.weights = weights
        self.block = model.block(layer, weights.block, routed)
        self.cache = model.cache[layer]

    @torch.inference_mode()
    def draft(self, hidden_states: torch.Tensor, batch: DraftBatch, choose: Choose) -> list[list[int]]:
        """Fill the cache rows of the batch and draft what is wanted.

        Drafts after the first are made from the layer's own output (before its norm, as the report hands it from depth to
        depth), as far as the sequence's pages reach.

        Args:
            hidden_states: [T, H] of the step, from `Transformer.hidden_states`.
            batch: what to do.
            choose: makes drafts of logits.

        Returns:
            For each segment its drafts, as many as wanted or fewer.
        """
        model = self.model
        known = hidden_states[torch.tensor(batch.rows, dtype=torch.int64, device=model.device)]
        entering = self._combined(batch.next_ids, model.normed(known, model.norm))
        going = [index for index, count in enumerate(batch.wanted) if count]
        ends = [batch.segments[index].start + batch.segments[index].length - 1 for index in going]
        self._fill(entering, batch.segments, except_for=set(ends))
        drafts: list[list[int]] = [[] for _ in batch.segments]
        entering = entering[torch.tensor(ends, dtype=torch.int64, device=model.device)]
        number = 0
        while going:
            places = [self._after(batch.segments[index], row, number) for row, index in enumerate(going)]
            output = self.block.end(self.block.begin(entering, model.positions(places), self.cache))
            logits = head_logits(model.normed(output, self.weights.norm), model.head)
            tokens = choose(going, logits, number)
            number += 1
            on = []
            for row, (index, token) in enumerate(zip(going, tokens, strict=True)):
                if token >= 0:
                    drafts[index].append(token)
                    if number < batch.wanted[index] and self._has_room(batch.segments[index], number):
                        on.append(row)
            going = [going[row] for row in on]
            if going:
                output = output[torch.tensor(on, dtype=torch.int64, device=model.device)]
                entering = self._combined([tokens[row] for row in on], output)
        return drafts

    def _combined(self, next_ids: Sequence[int], hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's input [R, H] from R tokens and the hidden states [R, H] of the positions before them."""
        embedded = self.model.embedded(next_ids)
        normed = (
            self.model.normed(embedded, self.weights.embedding_norm),
            self.model.normed(hidden_states, self.weights.hidden_norm),
        )
        return linear(torch.cat(normed, dim=-1), self.weights.projection)

    def _fill(self, entering: torch.Tensor, segments: Sequence[Segment], *, except_for: set[int]) -> None:
        """Write the cache rows of all but these rows of entering [R, H]: the block itself writes those."""
        size = self.model.page_size
        rows, positions, cache_rows = [], [], []
        for segment in segments:
            for offset in range(segment.length):
                if segment.start + offset not in except_for:
                    position = segment.position + offset
                    rows.append(segment.start + offset)
                    positions.append(position)
                    cache_rows.append(segment.block_table[position // size] * size + position % size)
        if rows:
            index = torch.tensor([rows, positions, cache_rows], dtype=torch.int64).to(self.model.device)
            self.block.fill(entering[index[0]], self.model.rotation[index[1]], index[2], self.cache)

    @staticmethod
    def _after(segment: Segment, row: int, number: int) -> Segment:
        """The one query that gives a segment's draft with this number, as `row` of a batch."""
        return Segment(row, 1, segment.position + segment.length - 1 + number, segment.block_table)

    def _has_room(self, segment: Segment, number: int) -> bool:
        """Whether the sequence has a page for the cache row behind the draft with this number."""
        return segment.position + segment.length - 1 + number < len(segment.block_table) * self.model.page_size
