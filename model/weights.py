"""Weights in the form the layers compute with: decoded to one dtype, gate and up projections joined.

On CPU every matrix is decoded to the compute dtype when it is loaded, FP8 included: torch has no useful FP8 arithmetic
there. Memory is then 4 bytes (float32) or 2 (bfloat16) a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.experts import MlpWeights
from .attention import AttentionWeights
from .config import ModelConfig
from .loading import DenseWeights, LayerWeights, LowRankQuery, StoredAttention, StoredLinear, StoredMlp
from .moe import GateWeights


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One layer. With a gate, `mlp` is the shared experts (or None); without, the dense MLP."""

    attention_norm: torch.Tensor
    attention: AttentionWeights
    feed_forward_norm: torch.Tensor
    gate: GateWeights | None
    mlp: MlpWeights | None


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """Everything a router computes with: embedding and head [V, H], final norm [H], and the blocks."""

    embedding: torch.Tensor
    blocks: tuple[BlockWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor


def mlp_weights(stored: StoredMlp, dtype: torch.dtype) -> MlpWeights:
    """One MLP decoded to `dtype`."""
    gate_up = torch.cat((stored.gate_proj.decoded(dtype), stored.up_proj.decoded(dtype)))
    return MlpWeights(gate_up, stored.down_proj.decoded(dtype))


def router_weights(config: ModelConfig, dense: DenseWeights, dtype: torch.dtype) -> RouterWeights:
    """A router's weights decoded to `dtype`; gates stay in fp32, where selection is decided."""
    embedding = dense.embed_tokens.to(dtype)
    return RouterWeights(
        embedding=embedding,
        blocks=tuple(_block(layer, dtype) for layer in dense.layers),
        norm=dense.norm.to(dtype),
        head=embedding if config.tie_word_embeddings else dense.lm_head.decoded(dtype),
    )


def _block(layer: LayerWeights, dtype: torch.dtype) -> BlockWeights:
    gate, mlp = None, None
    if isinstance(layer.mlp, StoredMlp):
        mlp = mlp_weights(layer.mlp, dtype)
    else:
        bias = layer.mlp.e_score_correction_bias
        gate = GateWeights(layer.mlp.gate.decoded(torch.float32), None if bias is None else bias.float())
        if layer.mlp.shared_experts is not None:
            mlp = mlp_weights(layer.mlp.shared_experts, dtype)
    return BlockWeights(
        attention_norm=layer.input_layernorm.to(dtype),
        attention=_attention(layer.attention, dtype),
        feed_forward_norm=layer.post_attention_layernorm.to(dtype),
        gate=gate,
        mlp=mlp,
    )


def _attention(stored: StoredAttention, dtype: torch.dtype) -> AttentionWeights:
    def optional(linear: StoredLinear | None) -> torch.Tensor | None:
        return None if linear is None else linear.decoded(dtype)

    low_rank = stored.query if isinstance(stored.query, LowRankQuery) else None
    query = stored.query.q_b_proj if isinstance(stored.query, LowRankQuery) else stored.query
    return AttentionWeights(
        q_a=optional(None if low_rank is None else low_rank.q_a_proj),
        q_a_norm=None if low_rank is None else low_rank.q_a_layernorm.to(dtype),
        q_b=query.decoded(dtype),
        kv_a=stored.kv_a_proj_with_mqa.decoded(dtype),
        kv_a_norm=stored.kv_a_layernorm.to(dtype),
        kv_b=stored.kv_b_proj.decoded(dtype),
        o=stored.o_proj.decoded(dtype),
    )
