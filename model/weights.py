"""Weights in the form the layers compute with: on their device, gate and up projections joined.

FP8 matrices stay FP8 where the process computes with them (`Compute.keep_fp8`); otherwise every matrix is decoded to the
compute dtype when it is loaded: 4 bytes (float32) or 2 (bfloat16) a parameter. For the native CPU kernels all are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..kernels.cpu.attention import PackedAttention
from ..kernels.cpu.matrix import pack
from ..kernels.experts import MlpWeights
from ..kernels.fp8 import BLOCK, BlockWeight, StoredWeight, Weight
from ..kernels.packed import TILE
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
    attention: AttentionWeights | PackedAttention
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
    head: Weight
    draft: DraftWeights | None = None


def mlp_weights(stored: StoredMlp, compute: Compute) -> MlpWeights:
    """One MLP as `compute` wants it."""
    parts = (stored.gate_proj, stored.up_proj, stored.down_proj)
    if compute.keep_fp8 and all(part.scale_inv is not None for part in parts):
        gate, up, down = (_fp8(part) for part in parts)
        joined, down = _joined(gate, up), _padded(down, columns=True)
        if compute.packed:
            return MlpWeights(pack(joined), pack(down))
        return MlpWeights(joined.to(compute.device), down.to(compute.device))
    if compute.packed:
        return _packed_mlp(*(part.decoded(compute.dtype) for part in parts))
    gate_up = torch.cat((stored.gate_proj.decoded(compute.dtype), stored.up_proj.decoded(compute.dtype)))
    return MlpWeights(gate_up.to(compute.device), stored.down_proj.decoded(compute.dtype).to(compute.device))


def router_weights(config: ModelConfig, dense: DenseWeights, compute: Compute) -> RouterWeights:
    """A router's weights; gates stay in fp32, where selection is decided."""
    embedding = _plain(dense.embed_tokens, compute)
    return RouterWeights(
        embedding=embedding,
        blocks=tuple(_block(config, layer, compute) for layer in dense.layers),
        norm=_plain(dense.norm, compute),
        head=_head(config, dense, embedding, compute),
        draft=None if dense.draft is None else _draft(config, dense.draft, compute),
    )


def _draft(config: ModelConfig, stored: StoredDraftLayer, compute: Compute) -> DraftWeights:
    return DraftWeights(
        embedding_norm=_plain(stored.enorm, compute),
        hidden_norm=_plain(stored.hnorm, compute),
        projection=_linear(stored.eh_proj, compute),
        block=_block(config, stored.layer, compute),
        norm=_plain(stored.norm, compute),
    )


def _head(config: ModelConfig, dense: DenseWeights, embedding: torch.Tensor, compute: Compute) -> Weight:
    if compute.packed:
        return pack(embedding if config.tie_word_embeddings else _decoded(dense.lm_head, compute))
    return embedding if config.tie_word_embeddings else _decoded(dense.lm_head, compute)


def _block(config: ModelConfig, layer: LayerWeights, compute: Compute) -> BlockWeights:
    gate, mlp = None, None
    if isinstance(layer.mlp, StoredMlp):
        mlp = mlp_weights(layer.mlp, compute)
    else:
        bias = layer.mlp.e_score_correction_bias
        gate = GateWeights(
            _gate(layer.mlp.gate, compute),
            None if bias is None else bias.float().to(compute.device),
        )
        if layer.mlp.shared_experts is not None:
            mlp = mlp_weights(layer.mlp.shared_experts, compute)
    return BlockWeights(
        attention_norm=_plain(layer.input_layernorm, compute),
        attention=_packed_attention(config, layer.attention, compute)
        if compute.packed
        else _attention(layer.attention, compute),
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


def _packed_attention(config: ModelConfig, stored: StoredAttention, compute: Compute) -> PackedAttention:
    low_rank = stored.query if isinstance(stored.query, LowRankQuery) else None
    query = stored.query.q_b_proj if isinstance(stored.query, LowRankQuery) else stored.query
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    heads = range(0, config.num_attention_heads * (nope + value), nope + value)
    up: StoredWeight
    # Where the halves of a head are whole blocks, each keeps its scales; else the scales would change within a sum.
    if compute.keep_fp8 and stored.kv_b_proj.scale_inv is not None and nope % BLOCK == value % BLOCK == 0:
        up = _fp8(stored.kv_b_proj)
    else:
        up = _decoded(stored.kv_b_proj, compute)
    return PackedAttention(
        q_a=None if low_rank is None else pack(_unpacked(low_rank.q_a_proj, compute)),
        q_a_norm=None if low_rank is None else _plain(low_rank.q_a_layernorm, compute),
        q_b=pack(_unpacked(query, compute)),
        kv_a=pack(_unpacked(stored.kv_a_proj_with_mqa, compute)),
        kv_a_norm=_plain(stored.kv_a_layernorm, compute),
        key_up=tuple(pack(_transposed(_rows(up, at, at + nope))) for at in heads),
        value_up=tuple(pack(_rows(up, at + nope, at + nope + value)) for at in heads),
        o=pack(_unpacked(stored.o_proj, compute)),
    )


def _packed_mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> MlpWeights:
    """In bf16, the intermediate size filled up to whole tiles with zeros."""
    missing = -gate.shape[0] % TILE
    gate, up = (functional.pad(part, (0, 0, 0, missing)) for part in (gate, up))
    return MlpWeights(pack(torch.cat((gate, up))), pack(functional.pad(down, (0, missing))))


def _gate(stored: StoredLinear, compute: Compute) -> Weight:
    """In fp32; packed, in bf16 where that is what is stored: its products with bf16 are exact, and sums are fp32 anyway."""
    if not compute.packed:
        return stored.decoded(torch.float32).to(compute.device)
    exact = stored.weight.dtype == torch.bfloat16
    return pack(stored.weight if exact else stored.decoded(torch.float32))


def _rows(weight: StoredWeight, start: int, stop: int) -> StoredWeight:
    """Rows of a matrix; of an FP8 one, whole blocks of them."""
    if isinstance(weight, torch.Tensor):
        return weight[start:stop]
    return BlockWeight(weight.codes[start:stop], weight.scale_inv[start // BLOCK : -(-stop // BLOCK)].contiguous())


def _transposed(weight: StoredWeight) -> StoredWeight:
    if isinstance(weight, torch.Tensor):
        return weight.t().contiguous()
    codes = weight.codes.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
    return BlockWeight(codes, weight.scale_inv.t().contiguous())


def _plain(tensor: torch.Tensor, compute: Compute) -> torch.Tensor:
    return tensor.to(compute.dtype).to(compute.device)


def _decoded(stored: StoredLinear, compute: Compute) -> torch.Tensor:
    return stored.decoded(compute.dtype).to(compute.device)


def _linear(stored: StoredLinear, compute: Compute) -> Weight:
    weight = _unpacked(stored, compute)
    return pack(weight) if compute.packed else weight


def _unpacked(stored: StoredLinear, compute: Compute) -> StoredWeight:
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
