"""Weights in the form the layers compute with: on their device, gate and up projections joined.

FP8 matrices stay as stored where the process computes in FP8 (`Compute.keep_fp8`); otherwise, and always on CPUs by
default, every matrix is decoded to the compute dtype when it is loaded: 4 bytes (float32) or 2 (bfloat16) a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..kernels.experts import MlpWeights
from ..kernels.fp8 import BLOCK, BlockWeight, Weight
from .attention import AttentionWeights
from .compute import Compute
from .config import ModelConfig
from .loading import (
    DenseWeights,
    LayerWeights,
    LowRankQuery,
    StoredAttention,
    StoredDraftLayer,
    StoredLinear,
    StoredMlp,
)
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
class DraftWeights:
    """The MTP layer: norms [H] of the next token's embedding, of the hidden state and before the head, and the projection of
    both [H, 2 H]."""

    embedding_norm: torch.Tensor
    hidden_norm: torch.Tensor
    projection: Weight
    block: BlockWeights
    norm: torch.Tensor


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """Everything a router computes with: embedding and head [V, H], final norm [H], the blocks, the MTP layer if served."""

    embedding: torch.Tensor
    blocks: tuple[BlockWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    draft: DraftWeights | None = None


def mlp_weights(stored: StoredMlp, compute: Compute) -> MlpWeights:
    """One MLP as `compute` wants it."""
    parts = (stored.gate_proj, stored.up_proj, stored.down_proj)
    if compute.keep_fp8 and all(part.scale_inv is not None for part in parts):
        gate, up, down = (_fp8(part) for part in parts)
        return MlpWeights(_joined(gate, up).to(compute.device), _padded(down, columns=True).to(compute.device))
    gate_up = torch.cat((stored.gate_proj.decoded(compute.dtype), stored.up_proj.decoded(compute.dtype)))
    return MlpWeights(gate_up.to(compute.device), stored.down_proj.decoded(compute.dtype).to(compute.device))


def router_weights(config: ModelConfig, dense: DenseWeights, compute: Compute) -> RouterWeights:
    """A router's weights; gates stay in fp32, where selection is decided."""
    embedding = _plain(dense.embed_tokens, compute)
    return RouterWeights(
        embedding=embedding,
        blocks=tuple(_block(layer, compute) for layer in dense.layers),
        norm=_plain(dense.norm, compute),
        head=embedding if config.tie_word_embeddings else _decoded(dense.lm_head, compute),
        draft=None if dense.draft is None else _draft(dense.draft, compute),
    )


def _draft(stored: StoredDraftLayer, compute: Compute) -> DraftWeights:
    return DraftWeights(
        embedding_norm=_plain(stored.enorm, compute),
        hidden_norm=_plain(stored.hnorm, compute),
        projection=_linear(stored.eh_proj, compute),
        block=_block(stored.layer, compute),
        norm=_plain(stored.norm, compute),
    )


def _block(layer: LayerWeights, compute: Compute) -> BlockWeights:
    gate, mlp = None, None
    if isinstance(layer.mlp, StoredMlp):
        mlp = mlp_weights(layer.mlp, compute)
    else:
        bias = layer.mlp.e_score_correction_bias
        gate = GateWeights(
            layer.mlp.gate.decoded(torch.float32).to(compute.device),
            None if bias is None else bias.float().to(compute.device),
        )
        if layer.mlp.shared_experts is not None:
            mlp = mlp_weights(layer.mlp.shared_experts, compute)
    return BlockWeights(
        attention_norm=_plain(layer.input_layernorm, compute),
        attention=_attention(layer.attention, compute),
        feed_forward_norm=_plain(layer.post_attention_layernorm, compute),
        gate=gate,
        mlp=mlp,
    )


def _attention(stored: StoredAttention, compute: Compute) -> AttentionWeights:
    low_rank = stored.query if isinstance(stored.query, LowRankQuery) else None
    query = stored.query.q_b_proj if isinstance(stored.query, LowRankQuery) else stored.query
    return AttentionWeights(
        q_a=None if low_rank is None else _linear(low_rank.q_a_proj, compute),
        q_a_norm=None if low_rank is None else _plain(low_rank.q_a_layernorm, compute),
        q_b=_linear(query, compute),
        kv_a=_linear(stored.kv_a_proj_with_mqa, compute),
        kv_a_norm=_plain(stored.kv_a_layernorm, compute),
        kv_b=_decoded(stored.kv_b_proj, compute),  # absorbed head by head, where blocks of 128 mean nothing
        o=_linear(stored.o_proj, compute),
    )


def _plain(tensor: torch.Tensor, compute: Compute) -> torch.Tensor:
    return tensor.to(compute.dtype).to(compute.device)


def _decoded(stored: StoredLinear, compute: Compute) -> torch.Tensor:
    return stored.decoded(compute.dtype).to(compute.device)


def _linear(stored: StoredLinear, compute: Compute) -> Weight:
    if compute.keep_fp8 and stored.scale_inv is not None:
        return _fp8(stored).to(compute.device)
    return _decoded(stored, compute)


def _fp8(stored: StoredLinear) -> BlockWeight:
    assert stored.scale_inv is not None
    return BlockWeight(stored.weight, stored.scale_inv)


def _joined(gate: BlockWeight, up: BlockWeight) -> BlockWeight:
    """Gate rows above up rows; each part is padded so that no block of 128 rows holds some of both."""
    gate, up = _padded(gate), _padded(up)
    return BlockWeight(_cat(gate.codes, up.codes), torch.cat((gate.scale_inv, up.scale_inv)))


def _padded(weight: BlockWeight, *, columns: bool = False) -> BlockWeight:
    """The weight with its rows (or columns) filled up with zeros to a multiple of 128; its blocks stay what they are.

    The sizes of the DeepSeek models are such multiples: nothing is copied then.
    """
    missing = -weight.codes.shape[1 if columns else 0] % BLOCK
    if not missing:
        return weight
    padding = (0, missing) if columns else (0, 0, 0, missing)
    codes = functional.pad(weight.codes.view(torch.uint8), padding)
    return BlockWeight(codes.view(torch.float8_e4m3fn), weight.scale_inv)


def _cat(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    # torch has no concatenation of float8 tensors on every device; their bytes it can join.
    return torch.cat((first.view(torch.uint8), second.view(torch.uint8))).view(torch.float8_e4m3fn)
