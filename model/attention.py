"""Multi-head latent attention (DeepSeek-V2 report, section 2.1, arXiv:2405.04434), absorbed, over a paged latent cache.

`model/reference.py` has the same attention unabsorbed and uncached, as the paper writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.attention_plan import AttentionPlan
from ..kernels.fp8 import Weight
from ..kernels.latent import write_latent
from ..kernels.linear import head_linear, linear
from ..kernels.mla import paged_mla_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import apply_rope, inverse_frequencies, rotation_table, yarn_inverse_frequencies, yarn_mscale
from .config import ModelConfig


def rope_rotation(config: ModelConfig, positions: int) -> torch.Tensor:
    """Rotation [positions, rope / 2, 2] of every position for this model, fp32."""
    dim, yarn = config.qk_rope_head_dim, config.rope_scaling
    if yarn is None:
        return rotation_table(inverse_frequencies(dim, config.rope_theta), positions, 1.0)
    frequencies = yarn_inverse_frequencies(
        dim,
        config.rope_theta,
        factor=yarn.factor,
        original_context=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
    )
    scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return rotation_table(frequencies, positions, scale)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on attention scores: 1/sqrt(d), and YaRN's temperature where the context was extended."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return float(scale)


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's attention, all matrices [out, in]; FP8 ones may be kept as stored.

    Attributes:
        q_a, q_a_norm: down-projection of queries to `q_lora_rank` and its norm; None where queries are not compressed.
        q_b: [heads * qk_head_dim, q_lora_rank], or [.., H] without compression.
        kv_a: [latent_dim, H]; kv_a_norm: [kv_lora_rank]; kv_b: [heads * (nope + v), kv_lora_rank]; o: [H, heads * v].
    """

    q_a: Weight | None
    q_a_norm: torch.Tensor | None
    q_b: Weight
    kv_a: Weight
    kv_a_norm: torch.Tensor
    kv_b: torch.Tensor
    o: Weight


@dataclass(frozen=True, slots=True)
class BatchPositions:
    """Where the T tokens of a batch stand.

    Attributes:
        positions: [T] int64, position of each token in its sequence.
        cache_rows: [T] int64, row of the flattened cache (page * page_size + offset) each token's latent goes to.
        rotation: [T, rope / 2, 2], the rows of `rope_rotation` for these positions.
        plan: which cached rows the tokens attend to.
    """

    positions: torch.Tensor
    cache_rows: torch.Tensor
    rotation: torch.Tensor
    plan: AttentionPlan


class MLA:
    """One layer's attention: writes the batch's latent rows to its cache, then attends over the pages."""

    def __init__(self, config: ModelConfig, weights: AttentionWeights) -> None:
        self.config = config
        self.weights = weights
        self.softmax_scale = softmax_scale(config)
        up = weights.kv_b.unflatten(0, (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim))
        key_up, value_up = up.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self.key_up = key_up.contiguous()  # [heads, nope, kv_lora]: absorbed into the query
        self.value_up = value_up.transpose(1, 2).contiguous()  # [heads, kv_lora, v]: absorbed into the output

    def __call__(self, hidden_states: torch.Tensor, batch: BatchPositions, cache: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H] and this layer's cache [P, page_size, row] (see `KvFormat`) to [T, H]."""
        c, w = self.config, self.weights
        self.write(hidden_states, batch.rotation, batch.cache_rows, cache)
        attended = paged_mla_attention(
            self.absorbed_query(hidden_states, batch.rotation),
            cache,
            batch.plan,
            value_dim=c.kv_lora_rank,
            softmax_scale=self.softmax_scale,
        )
        return linear(head_linear(attended, self.value_up).flatten(1), w.o)

    def write(
        self, hidden_states: torch.Tensor, rotation: torch.Tensor, cache_rows: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """Write the latent rows of hidden_states [T, H] alone; see `BatchPositions` for rotation and cache_rows."""
        w = self.weights
        compressed = linear(hidden_states, w.kv_a)
        write_latent(compressed, w.kv_a_norm, self.config.rms_norm_eps, rotation, cache, cache_rows)

    def query(self, hidden_states: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part without position [T, heads, nope] and the rotated part [T, heads, rope]."""
        c, w = self.config, self.weights
        if w.q_a is not None and w.q_a_norm is not None:
            hidden_states = rms_norm(linear(hidden_states, w.q_a), w.q_a_norm, c.rms_norm_eps)
        query = linear(hidden_states, w.q_b).unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        nope, rope = query.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return nope, apply_rope(rope, rotation)

    def absorbed_query(self, hidden_states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Queries [T, heads, latent_dim] that can be compared with cached rows directly."""
        nope, rope = self.query(hidden_states, rotation)
        return torch.cat((head_linear(nope, self.key_up), rope), dim=-1)
