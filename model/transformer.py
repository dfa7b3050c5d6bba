"""The router's part of the model: everything but the routed experts, over a paged latent cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch

from ..kernels.attention_plan import AttentionPlan, Segment
from ..kernels.cpu.attention import BatchTables, PackedAttention
from ..kernels.cpu.matrix import linear as packed_linear
from ..kernels.cpu.rows import rms_norm as packed_rms_norm
from ..kernels.cpu.rows import rows_of
from ..kernels.experts import swiglu_mlp
from ..kernels.fp8 import Weight
from ..kernels.kv_pages import KvFormat
from ..kernels.linear import linear
from ..kernels.packed import PackedWeight
from ..kernels.rms_norm import add_rms_norm, rms_norm
from .attention import MLA, BatchPositions, rope_rotation
from .compute import Compute
from .config import ModelConfig
from .cpu_block import CpuBlock, LayerRunner
from .moe import Gate, MoE, Pending, RoutedExperts
from .weights import BlockWeights, RouterWeights

MICRO_BATCH_TOKENS = 256
"""A step is computed in two parts if each has so many tokens. With fewer, experts are bound by reading their weights
(facts of `moray plan`: R1's up to some 256 tokens), and two parts would read most of them twice."""

SPARED_ROWS = 16
"""The last layer is computed for the sampled rows alone if so many others need none of it. Of fewer its experts' weights are
most of what it takes, which sampled rows read as well."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Input of one step over T tokens.

    Attributes:
        token_ids: the T tokens, sequence after sequence.
        segments: the sequences; lengths add up to T.
        sample_rows: rows whose next-token logits are wanted, ascending.
    """

    token_ids: Sequence[int]
    segments: Sequence[Segment]
    sample_rows: Sequence[int]


_Part = tuple[int, int, "BatchPositions | BatchTables"]
"""First row, row after the last, and where the tokens stand."""


class LayerBlock(Protocol):
    """One layer in two halves, so that something else can be computed while the routed experts are away.

    What `begin` is given to know of the batch, and what it gives to `end`, is the block's own: see `Block` and `CpuBlock`.
    """

    def begin(self, hidden_states: torch.Tensor, batch: Any, cache: torch.Tensor) -> Any:
        """hidden_states [T, H], which may be changed, through attention; the routed experts are asked for."""

    def end(self, begun: Any) -> torch.Tensor:
        """The layer's output [T, H]."""

    def fill(
        self, hidden_states: torch.Tensor, rotation: torch.Tensor, cache_rows: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """Only write the cache rows of hidden_states [T, H], for tokens whose own output nobody needs."""


class Block(Generic[Pending]):
    """One transformer layer: attention and a feed-forward part, each behind a norm and around a residual."""

    def __init__(self, layer: int, config: ModelConfig, weights: BlockWeights, routed: RoutedExperts[Pending]) -> None:
        assert not isinstance(weights.attention, PackedAttention), "packed weights are for CpuBlock"
        self.eps = config.rms_norm_eps
        self.attention_norm = weights.attention_norm
        self.attention = MLA(config, weights.attention)
        self.feed_forward_norm = weights.feed_forward_norm
        self.moe = None if weights.gate is None else MoE(layer, Gate(config, weights.gate), weights.mlp, routed)
        self.dense = weights.mlp
        assert self.moe is not None or self.dense is not None, f"layer {layer} has neither a gate nor an MLP"

    def begin(
        self, hidden_states: torch.Tensor, batch: BatchPositions, cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[Pending, torch.Tensor | None] | None]:
        """The residual [T, H], and the dense MLP's output or what `MoE.begin` gave."""
        normed = rms_norm(hidden_states, self.attention_norm, self.eps)
        attended = self.attention(normed, batch, cache)
        hidden_states, normed = add_rms_norm(hidden_states, attended, self.feed_forward_norm, self.eps)
        if self.moe is not None:
            return hidden_states, None, self.moe.begin(normed)
        assert self.dense is not None
        return hidden_states, swiglu_mlp(normed, self.dense), None

    def end(
        self, begun: tuple[torch.Tensor, torch.Tensor | None, tuple[Pending, torch.Tensor | None] | None]
    ) -> torch.Tensor:
        """[T, H]."""
        hidden_states, output, pending = begun
        if pending is not None:
            assert self.moe is not None
            output = self.moe.end(*pending).to(hidden_states.dtype)
        assert output is not None
        return hidden_states + output

    def fill(
        self, hidden_states: torch.Tensor, rotation: torch.Tensor, cache_rows: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """See `LayerBlock`; `BatchPositions` says what rotation and cache_rows are."""
        normed = rms_norm(hidden_states, self.attention_norm, self.eps)
        self.attention.write(normed, rotation, cache_rows, cache)


class Transformer:
    """Embedding, blocks, final norm and head, with a latent cache of `pages` pages.

    Args:
        weights: as `compute` wants them.
        routed: where the routed experts are.
        pages, page_size: size of the cache; `max_context` positions are prepared for RoPE.
        compute: where and in what to compute.
        micro_batch_tokens: see `MICRO_BATCH_TOKENS`.
        elsewhere: whether routed experts are computed by other processors than these: two parts of a batch hide that time,
            and are of no use where there is nothing to hide.
        run_layers: takes batches of one part through packed layers, where it can.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: RouterWeights,
        routed: RoutedExperts[Pending],
        *,
        pages: int,
        page_size: int,
        max_context: int,
        compute: Compute,
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
        elsewhere: Callable[[], bool] = lambda: True,
        run_layers: LayerRunner | None = None,
    ) -> None:
        self.config = config
        self.micro_batch_tokens = micro_batch_tokens
        self.page_size = page_size
        self.embedding = weights.embedding
        self.norm = weights.norm
        self.head = weights.head
        self.device = compute.device
        self.rotation = rope_rotation(config, max_context).to(self.device)
        self.packed = compute.packed
        self.blocks = [self.block(layer, block, routed) for layer, block in enumerate(weights.blocks)]
        stored = torch.uint8 if compute.fp8_kv else compute.dtype
        form = KvFormat(config.kv_lora_rank, config.qk_rope_head_dim, stored)
        self.cache = form.create(config.cached_layers, pages, page_size, self.device)
        self._elsewhere = elsewhere
        self._run_layers = run_layers
        self._layers = [
            block.described(self.cache[number])
            for number, block in enumerate(self.blocks)
            if isinstance(block, CpuBlock)
        ]

    def block(self, layer: int, weights: BlockWeights, routed: RoutedExperts[Pending]) -> LayerBlock:
        """Layer number `layer` with these weights."""
        kind = CpuBlock if self.packed else Block
        return kind(layer, self.config, weights, routed)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch, filling the cache; returns logits [len(sample_rows), V] in fp32.

        Repeating a batch after a failure half-way is safe: it writes the same rows again.
        """
        return self.logits(self.sampled_states(batch))

    @torch.inference_mode()
    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """What `forward` has before the final norm, of every row: [T, H]."""
        return self._through(self.embedded(batch.token_ids), self._parts(batch.segments), range(len(self.blocks)))

    @torch.inference_mode()
    def sampled_states(self, batch: ForwardBatch) -> torch.Tensor:
        """The same of the sampled rows: [len(sample_rows), H].

        Of a prompt only the last row is sampled. In the last layer the others are keys for it, and nothing else: there they
        are written to the cache, and not attended from, nor sent to experts. The bits are the same.
        """
        others = len(batch.token_ids) - len(batch.sample_rows)
        if not others:
            return self.hidden_states(batch)
        rows = torch.tensor(batch.sample_rows, dtype=torch.int64, device=self.device)
        if others < SPARED_ROWS:
            return self.hidden_states(batch)[rows]
        parts, last = self._parts(batch.segments), len(self.blocks) - 1
        below = self._through(self.embedded(batch.token_ids), parts, range(last))
        for begin, end, positions in parts:
            self.blocks[last].fill(below[begin:end], positions.rotation, positions.cache_rows, self.cache[last])
        sampled = below[rows]
        if not batch.sample_rows:
            return sampled
        there = self.positions(segments_of_rows(batch))
        return self._through(sampled, [(0, len(rows), there)], range(last, last + 1))

    def embedded(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What tokens enter the layers as: [len(token_ids), H]."""
        if self.packed:
            return rows_of(self.embedding, token_ids)
        return self.embedding[torch.tensor(token_ids, dtype=torch.int64, device=self.device)]

    def _parts(self, segments: Sequence[Segment]) -> list[_Part]:
        tokens = self.micro_batch_tokens if self._elsewhere() else None
        return [(begin, end, self.positions(part)) for begin, end, part in micro_batches(segments, tokens)]

    def _through(self, hidden_states: torch.Tensor, parts: Sequence[_Part], numbers: range) -> torch.Tensor:
        """hidden_states [T, H], which may be changed, through the blocks with these numbers."""
        if len(parts) == 1 and self._run_layers is not None:
            positions = parts[0][2]
            if isinstance(positions, BatchTables) and self._run_layers(self._layers, numbers, hidden_states, positions):
                return hidden_states
        return self._through_blocks(hidden_states, parts, numbers)

    def _through_blocks(self, hidden_states: torch.Tensor, parts: Sequence[_Part], numbers: range) -> torch.Tensor:
        """The parts of a batch [T, H] through these blocks in turn: while the experts of one are away, the next is computed.

        A part's keys are in the cache before the next part attends, so a sequence may go on from one to the next.
        """
        states: list[Any] = [hidden_states[begin:end] for begin, end, _ in parts]
        previous: LayerBlock | None = None
        for number in numbers:
            block, cache = self.blocks[number], self.cache[number]
            states = [
                block.begin(state if previous is None else previous.end(state), positions, cache)
                for state, (_, _, positions) in zip(states, parts, strict=True)
            ]
            previous = block
        ended = states if previous is None else [previous.end(state) for state in states]
        return ended[0] if len(ended) == 1 else torch.cat(ended)

    @torch.inference_mode()
    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in fp32 of rows [R, H] as `sampled_states` gives them."""
        return head_logits(self.normed(hidden_states, self.norm), self.head)

    def normed(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """hidden_states [R, H] behind a norm with `weight` [H]."""
        norm = packed_rms_norm if self.packed else rms_norm
        return norm(hidden_states, weight, self.config.rms_norm_eps)

    def positions(self, segments: Sequence[Segment]) -> BatchPositions | BatchTables:
        """Where the tokens of these segments stand, as the blocks want it."""
        size = self.page_size
        if self.packed:
            return BatchTables.of_segments(segments, self.rotation, page_size=size, row=self.cache.shape[-1])
        position = [p for s in segments for p in range(s.position, s.position + s.length)]
        rows = [
            s.block_table[p // size] * size + p % size
            for s in segments
            for p in range(s.position, s.position + s.length)
        ]
        index = torch.tensor([position, rows], dtype=torch.int64).to(self.device)  # in one copy
        plan = AttentionPlan.build(segments, size, self.device)
        return BatchPositions(index[0], index[1], self.rotation[index[0]], plan)


def head_logits(normed: torch.Tensor, head: Weight) -> torch.Tensor:
    """Of rows [R, H] behind a final norm: [R, V] in fp32."""
    if isinstance(head, PackedWeight):
        return packed_linear(normed, head, torch.float32)
    return linear(normed, head).float()


def micro_batches(segments: Sequence[Segment], tokens: int | None) -> Iterator[tuple[int, int, Sequence[Segment]]]:
    """Cut a batch in two halves if each then has `tokens` or more: (first row, row after the last, segments) of each part.
    None: it stays whole.

    Rows of a part's segments count from its own first row.
    """
    total = sum(segment.length for segment in segments)
    if tokens is None or total < 2 * tokens:
        yield 0, total, segments
        return
    half = total // 2
    for begin, end in ((0, half), (half, total)):
        part = []
        for segment in segments:
            first, last = max(segment.start, begin), min(segment.start + segment.length, end)
            if first < last:
                position = segment.position + first - segment.start
                part.append(Segment(first - begin, last - first, position, segment.block_table))
        yield begin, end, part


def segments_of_rows(batch: ForwardBatch) -> list[Segment]:
    """Where the sampled rows of a batch stand, as a batch of their own: a segment for each."""
    starts = [segment.start for segment in batch.segments]
    found = []
    for number, row in enumerate(batch.sample_rows):
        segment = batch.segments[bisect_right(starts, row) - 1]
        found.append(Segment(number, 1, segment.position + row - segment.start, segment.block_table))
    return found
