"""One transformer layer over the native CPU kernels: `Block` of `transformer.py`, in three calls around the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import torch

from ..kernels.cpu.attention import AttentionKernel, BatchTables, LayerShape, PackedAttention, PackedGate, add
from ..kernels.cpu.mlp import SwigluKernel
from ..kernels.experts import MlpWeights
from ..kernels.packed import PackedWeight
from .attention import softmax_scale
from .config import ModelConfig
from .moe import GateWeights, Pending, RoutedExperts
from .weights import BlockWeights


@dataclass(frozen=True, slots=True)
class Begun(Generic[Pending]):
    """A layer whose attention is done and whose routed experts are on their way.

    Attributes:
        hidden_states: [T, H], the residual.
        routed: what `RoutedExperts.start` gave, or None in a layer without.
        shared: [T, H] fp32, of the shared experts or the dense MLP.
    """

    hidden_states: torch.Tensor
    routed: Pending | None
    shared: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class CpuLayer:
    """A layer for native code that takes a batch through several of them.

    Attributes:
        number: of the layer.
        attention: address of its `moray_layer`; cache: of its pages; mlp: of the `moray_mlp` that is computed here, or None.
        top_k: experts of a token; 0 for a layer without.
    """

    number: int
    attention: int
    cache: int
    mlp: int | None
    top_k: int


class LayerRunner(Protocol):
    """Takes a batch through layers that follow each other without the interpreter between them."""

    def __call__(
        self, layers: Sequence[CpuLayer], numbers: range, hidden_states: torch.Tensor, batch: BatchTables
    ) -> bool:
        """Through those with these numbers, as `CpuBlock.begin` and `end` in turn would: the same bits.

        Args:
            layers: all of a model's, always the same object; what they describe stays where it is.
            numbers: of some that follow each other.
            hidden_states: [T, H] contiguous bf16; the output of the last of them afterwards.
            batch: of these tokens.

        Returns:
            False if it cannot be done so now; then nothing has been done.
        """


class CpuBlock(Generic[Pending]):
    """A layer whose weights are packed. The residual is changed in place, so `begin` takes what nobody else needs."""

    def __init__(self, layer: int, config: ModelConfig, weights: BlockWeights, routed: RoutedExperts[Pending]) -> None:
        assert isinstance(weights.attention, PackedAttention), "packed weights"
        self.layer = layer
        self.routed = routed
        self.shared = None if weights.mlp is None else _swiglu(weights.mlp)
        self.attention = AttentionKernel(
            LayerShape(
                hidden=config.hidden_size,
                heads=config.num_attention_heads,
                nope=config.qk_nope_head_dim,
                rope=config.qk_rope_head_dim,
                value=config.v_head_dim,
                kv_rank=config.kv_lora_rank,
                eps=config.rms_norm_eps,
                scale=softmax_scale(config),
            ),
            weights.attention,
            weights.attention_norm,
            weights.feed_forward_norm,
            None if weights.gate is None else _gate(config, weights.gate),
        )

    def described(self, cache: torch.Tensor) -> CpuLayer:
        """This layer, with its pages [P, page_size, kv_rank + rope]; valid for as long as both are there."""
        gate, mlp = self.attention.gate, self.shared
        return CpuLayer(
            self.layer,
            self.attention.address,
            cache.data_ptr(),
            None if mlp is None else mlp.address,
            0 if gate is None else gate.top_k,
        )

    def begin(self, hidden_states: torch.Tensor, batch: BatchTables, cache: torch.Tensor) -> Begun[Pending]:
        """Attention, the gate, and what of the feed-forward part is computed here; routed experts are asked for."""
        normed, ids, weights = self.attention(hidden_states, batch, cache)
        routed = None
        if ids is not None and weights is not None:
            routed = self.routed.start(self.layer, normed, ids, weights)
        return Begun(hidden_states, routed, None if self.shared is None else self.shared(normed))

    def end(self, begun: Begun[Pending]) -> torch.Tensor:
        """The layer's output [T, H], once the routed experts have answered."""
        routed = None if begun.routed is None else self.routed.finish(begun.routed)
        add(begun.hidden_states, routed, begun.shared)
        return begun.hidden_states

    def fill(
        self, hidden_states: torch.Tensor, rotation: torch.Tensor, cache_rows: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """See `LayerBlock`."""
        self.attention.fill(hidden_states, rotation, cache_rows, cache)


def _gate(config: ModelConfig, gate: GateWeights) -> PackedGate:
    assert isinstance(gate.weight, PackedWeight), "packed weights"
    return PackedGate(
        gate.weight,
        gate.correction_bias,
        top_k=config.num_experts_per_tok,
        softmax=config.scoring_func == "softmax",
        groups=config.n_group,
        kept_groups=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


def _swiglu(mlp: MlpWeights) -> SwigluKernel:
    assert isinstance(mlp.gate_up, PackedWeight), "packed weights"
    assert isinstance(mlp.down, PackedWeight), "packed weights"
    return SwigluKernel(mlp.gate_up, mlp.down)
