"""Mixture of experts: the gate, the shared experts, and the routed experts wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from ..kernels.combine import combine
from ..kernels.experts import ExpertWeights, MlpWeights, grouped_mlp, swiglu_mlp
from ..kernels.fp8 import Weight
from ..kernels.gate import select_experts
from ..kernels.linear import linear
from ..kernels.permute import sort_by_slot
from .config import ModelConfig

Pending = TypeVar("Pending")


class RoutedExperts(Protocol[Pending]):
    """Runs routed experts, here or elsewhere. Split in two so that the shared expert runs while the routed ones are away."""

    def start(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Pending:
        """Begin with hidden_states [T, H] through experts topk_ids [T, K] of `layer`."""

    def finish(self, pending: Pending) -> torch.Tensor:
        """The sum over K in top-k order, weighted by topk_weights: [T, H] in fp32."""


class LocalExperts:
    """`RoutedExperts` over weights in this process, for tests and as the readable form of what dispatch must equal."""

    def __init__(self, experts: Mapping[int, Mapping[int, MlpWeights]]) -> None:
        self.experts = {layer: ExpertWeights(by_slot) for layer, by_slot in experts.items()}

    def start(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute at once."""
        tokens, top_k = topk_ids.shape
        experts, slots = self.experts[layer], topk_ids.flatten()
        order, _ = sort_by_slot(slots, experts.num_slots)
        outputs = hidden_states.new_empty((tokens * top_k, hidden_states.shape[1]))
        outputs[order] = grouped_mlp(hidden_states, order // top_k, slots[order], experts)
        return combine(outputs.view(tokens, top_k, -1), topk_weights)

    def finish(self, pending: torch.Tensor) -> torch.Tensor:
        """What `start` computed."""
        return pending


@dataclass(frozen=True, slots=True)
class GateWeights:
    """The gate in fp32: weight [E, H] (packed, it may be in bf16) and the selection bias [E], or None."""

    weight: Weight
    correction_bias: torch.Tensor | None


class Gate:
    """Chooses experts for tokens; the scores are computed in fp32, where near-ties decide the same way every time."""

    def __init__(self, config: ModelConfig, weights: GateWeights) -> None:
        self.config = config
        self.weights = weights

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_ids and topk_weights [T, K] for hidden_states [T, H]."""
        c = self.config
        return select_experts(
            linear(hidden_states.float(), self.weights.weight),
            top_k=c.num_experts_per_tok,
            scoring=c.scoring_func,
            correction_bias=self.weights.correction_bias,
            groups=c.n_group,
            kept_groups=c.topk_group,
            normalise=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )


class MoE(Generic[Pending]):
    """One layer's feed-forward part: routed experts plus shared ones."""

    def __init__(self, layer: int, gate: Gate, shared: MlpWeights | None, routed: RoutedExperts[Pending]) -> None:
        self.layer = layer
        self.gate = gate
        self.shared = shared
        self.routed = routed

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H]; routed and shared outputs are added in fp32, rounded once."""
        return self.end(*self.begin(hidden_states)).to(hidden_states.dtype)

    def begin(self, hidden_states: torch.Tensor) -> tuple[Pending, torch.Tensor | None]:
        """Ask for the routed experts; what the shared ones give [T, H] meanwhile, in fp32."""
        pending = self.routed.start(self.layer, hidden_states, *self.gate(hidden_states))
        return pending, None if self.shared is None else swiglu_mlp(hidden_states, self.shared).float()

    def end(self, pending: Pending, shared: torch.Tensor | None) -> torch.Tensor:
        """The sum [T, H] of both in fp32."""
        output = self.routed.finish(pending)
        return output if shared is None else output + shared
