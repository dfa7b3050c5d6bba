"""The whole model as the papers write it: one sequence, no cache, nothing absorbed, every expert at hand.

The readable twin of `transformer.py` and the oracle of its tests. DeepSeek-V3 report: arXiv:2412.19437.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from ..kernels.cpu.attention import PackedAttention
from ..kernels.cpu.matrix import unpack
from ..kernels.experts import MlpWeights
from ..kernels.fp8 import BlockWeight, Weight, dequantize_blocks
from ..kernels.packed import PackedWeight
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import apply_rope
from .attention import MLA, rope_rotation
from .config import ModelConfig
from .moe import Gate
from .weights import BlockWeights, RouterWeights


def reference_logits(
    config: ModelConfig,
    weights: RouterWeights,
    experts: Mapping[int, Mapping[int, MlpWeights]],
    token_ids: list[int],
) -> torch.Tensor:
    """Logits [T, V] in fp32 at every position of `token_ids`."""
    return _linear(_hidden_states(config, weights, experts, token_ids), weights.head).float()


def reference_draft_logits(
    config: ModelConfig,
    weights: RouterWeights,
    experts: Mapping[int, Mapping[int, MlpWeights]],
    token_ids: list[int],
) -> torch.Tensor:
    """The MTP layer's logits [T - 1, V] in fp32: those at i are of the token at i + 2, from the hidden state of i after the
    final norm and the embedding of the token at i + 1 (report, section 2.2)."""
    draft, eps = weights.draft, config.rms_norm_eps
    assert draft is not None, "the configuration has no draft layer"
    hidden_states = _hidden_states(config, weights, experts, token_ids)[:-1]
    embedded = weights.embedding[torch.tensor(token_ids[1:])]
    both = torch.cat(
        (rms_norm(embedded, draft.embedding_norm, eps), rms_norm(hidden_states, draft.hidden_norm, eps)), -1
    )
    rotation = rope_rotation(config, len(token_ids) - 1)
    x = _block(config, draft.block, experts[config.num_hidden_layers], _linear(both, draft.projection), rotation)
    return _linear(rms_norm(x, draft.norm, eps), weights.head).float()


def _hidden_states(
    config: ModelConfig,
    weights: RouterWeights,
    experts: Mapping[int, Mapping[int, MlpWeights]],
    token_ids: list[int],
) -> torch.Tensor:
    """[T, H] after the final norm."""
    rotation = rope_rotation(config, len(token_ids))
    x = weights.embedding[torch.tensor(token_ids)]
    for layer, block in enumerate(weights.blocks):
        x = _block(config, block, experts.get(layer, {}), x, rotation)
    return rms_norm(x, weights.norm, config.rms_norm_eps)


def _block(
    config: ModelConfig,
    block: BlockWeights,
    experts: Mapping[int, MlpWeights],
    x: torch.Tensor,
    rotation: torch.Tensor,
) -> torch.Tensor:
    assert not isinstance(block.attention, PackedAttention), "attention as it is written, not packed"
    attention = MLA(config, block.attention)
    x = x + _attend(attention, rms_norm(x, block.attention_norm, config.rms_norm_eps), rotation)
    normed = rms_norm(x, block.feed_forward_norm, config.rms_norm_eps)
    output = torch.zeros_like(x) if block.mlp is None else _mlp(normed, block.mlp)
    if block.gate is not None:
        ids, gates = Gate(config, block.gate)(normed)
        for token in range(x.shape[0]):
            for expert, weight in zip(ids[token].tolist(), gates[token], strict=True):
                output[token] += weight * _mlp(normed[token], experts[expert])
    return x + output


def _attend(attention: MLA, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Every head gets keys and values of its own, expanded from the latent: [T, H] to [T, H]."""
    config, weights = attention.config, attention.weights
    heads, tokens = config.num_attention_heads, x.shape[0]
    nope, rope = attention.query(x, rotation)
    compressed, shared_key = _linear(x, weights.kv_a).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    expanded = _linear(rms_norm(compressed, weights.kv_a_norm, config.rms_norm_eps), weights.kv_b)
    key, value = expanded.unflatten(-1, (heads, -1)).split([config.qk_nope_head_dim, config.v_head_dim], -1)
    shared_key = apply_rope(shared_key, rotation)[:, None].expand(-1, heads, -1)
    query, key = torch.cat((nope, rope), -1), torch.cat((key, shared_key), -1)
    scores = torch.einsum("qhd,khd->hqk", query, key).float() * attention.softmax_scale
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1).to(x.dtype), value)
    return _linear(attended.flatten(1), weights.o)


def _mlp(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    gate, up = _linear(x, weights.gate_up).chunk(2, dim=-1)
    return _linear(functional.silu(gate) * up, weights.down)


def _linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Weights kept in FP8 are decoded; activations stay as they are."""
    if isinstance(weight, PackedWeight):
        weight = unpack(weight).to(x.dtype)
    if isinstance(weight, BlockWeight):
        weight = dequantize_blocks(weight.codes, weight.scale_inv, x.dtype)
    return functional.linear(x, weight)
