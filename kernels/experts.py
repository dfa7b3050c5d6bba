"""The feed-forward part: SwiGLU MLPs one by one and grouped by expert, and the exact combine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .linear import linear, silu


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """One SwiGLU MLP: gate_up [2N, H] (gate rows first, then up rows) and down [H, N], in the compute dtype."""

    gate_up: torch.Tensor
    down: torch.Tensor


def swiglu_mlp(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) for x [T, H]; row-invariant."""
    gate, up = linear(x, weights.gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, weights.down)


def grouped_mlp(
    hidden_states: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: Mapping[int, MlpWeights]
) -> torch.Tensor:
    """Run each (token, expert) pair through its expert.

    Args:
        hidden_states: [T, H], each token once however many of its experts are here.
        rows: [P] integers, the token of each pair.
        slots: [P] integers in ascending order, the slot of each pair; only slots that occur are read.
        weights: the MLP in each slot.

    Returns:
        [P, H] in hidden_states' dtype, in the order of the pairs.
    """
    output = torch.empty(
        (rows.shape[0], hidden_states.shape[1]), dtype=hidden_states.dtype, device=hidden_states.device
    )
    present, counts = torch.unique_consecutive(slots, return_counts=True)
    gathered = hidden_states.index_select(0, rows)
    start = 0
    for slot, count in zip(present.tolist(), counts.tolist(), strict=True):
        output[start : start + count] = swiglu_mlp(gathered[start : start + count], weights[slot])
        start += count
    return output


def combine(pair_outputs: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Sum expert outputs [T, K, H] with weights [T, K] in fp32 and in top-k order, giving [T, H] in fp32.

    The order is part of the contract: the bits do not depend on where the experts ran or who answered first.
    """
    total = pair_outputs[:, 0].float() * topk_weights[:, 0, None]
    for k in range(1, pair_outputs.shape[1]):
        total = total + pair_outputs[:, k].float() * topk_weights[:, k, None]
    return total
