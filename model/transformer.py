"""The router's part of the model: everything but the routed experts, over a paged latent cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.attention_plan import AttentionPlan, Segment
from ..kernels.experts import swiglu_mlp
from ..kernels.kv_pages import KvFormat
from ..kernels.linear import linear
from ..kernels.rms_norm import add_rms_norm, rms_norm
from .attention import MLA, BatchPositions, rope_rotation
from .compute import Compute
from .config import ModelConfig
from .moe import Gate, MoE, Pending, RoutedExperts
from .weights import BlockWeights, RouterWeights


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


class Block:
    """One transformer layer: attention and a feed-forward part, each behind a norm and around a residual."""

    def __init__(
        self, config: ModelConfig, weights: BlockWeights, feed_forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attention_norm = weights.attention_norm
        self.attention = MLA(config, weights.attention)
        self.feed_forward_norm = weights.feed_forward_norm
        self.feed_forward = feed_forward

    def __call__(self, hidden_states: torch.Tensor, batch: BatchPositions, cache: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H]."""
        normed = rms_norm(hidden_states, self.attention_norm, self.eps)
        attended = self.attention(normed, batch, cache)
        hidden_states, normed = add_rms_norm(hidden_states, attended, self.feed_forward_norm, self.eps)
        return hidden_states + self.feed_forward(normed)

    def fill(
        self, hidden_states: torch.Tensor, rotation: torch.Tensor, cache_rows: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """Only write the cache rows of hidden_states [T, H], for tokens whose own output nobody needs."""
        normed = rms_norm(hidden_states, self.attention_norm, self.eps)
        self.attention.write(normed, rotation, cache_rows, cache)


class Transformer:
    """Embedding, blocks, final norm and head, with a latent cache of `pages` pages.

    Args:
        weights: as `compute` wants them.
        routed: where the routed experts are.
        pages, page_size: size of the cache; `max_context` positions are prepared for RoPE.
        compute: where and in what to compute.
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
    ) -> None:
        self.config = config
        self.page_size = page_size
        self.embedding = weights.embedding
        self.norm = weights.norm
        self.head = weights.head
        self.device = compute.device
        self.rotation = rope_rotation(config, max_context).to(self.device)
        self.blocks = [
            Block(config, block, self.feed_forward(layer, block, routed)) for layer, block in enumerate(weights.blocks)
        ]
        stored = torch.uint8 if compute.fp8_kv else compute.dtype
        form = KvFormat(config.kv_lora_rank, config.qk_rope_head_dim, stored)
        self.cache = form.create(config.cached_layers, pages, page_size, self.device)

    def feed_forward(
        self, layer: int, block: BlockWeights, routed: RoutedExperts[Pending]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The feed-forward part of a layer with these weights."""
        if block.gate is not None:
            return MoE(layer, Gate(self.config, block.gate), block.mlp, routed)
        dense = block.mlp
        assert dense is not None, f"layer {layer} has neither a gate nor an MLP"
        return lambda hidden_states: swiglu_mlp(hidden_states, dense)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch, filling the cache; returns logits [len(sample_rows), V] in fp32.

        Repeating a batch after a failure half-way is safe: it writes the same rows again.
        """
        return self.logits(self.hidden_states(batch), batch.sample_rows)

    @torch.inference_mode()
    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """What `forward` has before the final norm: [T, H]."""
        positions = self.positions(batch.segments)
        hidden_states = self.embedding[torch.tensor(batch.token_ids, device=self.device)]
        for layer, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, positions, self.cache[layer])
        return hidden_states

    @torch.inference_mode()
    def logits(self, hidden_states: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Logits [len(rows), V] in fp32 of these rows of hidden_states [T, H]."""
        chosen = hidden_states[torch.tensor(rows, dtype=torch.int64, device=self.device)]
        return linear(rms_norm(chosen, self.norm, self.config.rms_norm_eps), self.head).float()

    def positions(self, segments: Sequence[Segment]) -> BatchPositions:
        """Where the tokens of these segments stand."""
        size = self.page_size
        position = [p for s in segments for p in range(s.position, s.position + s.length)]
        rows = [
            s.block_table[p // size] * size + p % size
            for s in segments
            for p in range(s.position, s.position + s.length)
        ]
        index = torch.tensor([position, rows], dtype=torch.int64).to(self.device)  # in one copy
        plan = AttentionPlan.build(segments, size, self.device)
        return BatchPositions(index[0], index[1], self.rotation[index[0]], plan)
