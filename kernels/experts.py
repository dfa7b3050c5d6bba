"""The feed-forward part: SwiGLU MLPs (Shazeer, 2020, arXiv:2002.05202) one by one, and grouped by expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .block_gemm import block_gemm
from .cpu.mlp import MlpTable, SwigluKernel
from .fp8 import BlockWeight, StoredWeight, Weight
from .grouped_gemm import WeightTable, grouped_gemm, schedule_tiles, token_tile
from .launch import uses_triton
from .linear import linear
from .packed import PackedWeight
from .quantize import quantize_rows
from .silu_quantize import silu_mul, silu_mul_quantize


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """One SwiGLU MLP: gate_up [2N, H] (gate rows first, then up rows) and down [H, N].

    In the compute dtype, in FP8 with N a multiple of 128, or both packed.
    """

    gate_up: Weight
    down: Weight

    @property
    def hidden_size(self) -> int:
        """H."""
        weight = self.gate_up
        return weight.columns if isinstance(weight, PackedWeight) else _elements(weight).shape[1]


class ExpertWeights(Mapping[int, MlpWeights]):
    """The MLP in each slot; read-only. For the GPU kernels it also knows where each of them is in memory.

    Nothing is copied: sets that share experts, as those of successive placement epochs do, share their memory.

    Args:
        by_slot: slot -> MLP, all of one shape, kind and device; slots need not be consecutive.

    Attributes:
        num_slots: one more than the largest slot.
        tables: the addresses of gate_up and of down; None on a CPU, and where there is no expert.
        packed: the same for the native CPU kernels, where the weights are packed.

    Raises:
        ValueError: the MLPs differ (checked where kernels need it).
    """

    def __init__(self, by_slot: Mapping[int, MlpWeights]) -> None:
        self._by_slot = dict(by_slot)
        self.num_slots = max(self._by_slot, default=-1) + 1
        self.tables: tuple[WeightTable, WeightTable] | None = None
        self.packed: MlpTable | None = None
        first = next(iter(self._by_slot.values()), None)
        if first is not None and isinstance(first.gate_up, PackedWeight):
            self.packed = MlpTable({slot: _packed(mlp) for slot, mlp in self._by_slot.items()}, self.num_slots)
        elif first is not None and uses_triton(_elements(first.gate_up), _elements(first.down)):
            gate_up = WeightTable({slot: _stored(mlp.gate_up) for slot, mlp in self._by_slot.items()})
            down = WeightTable({slot: _stored(mlp.down) for slot, mlp in self._by_slot.items()})
            self.tables = gate_up, down

    def __getitem__(self, slot: int) -> MlpWeights:
        return self._by_slot[slot]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_slot)

    def __len__(self) -> int:
        return len(self._by_slot)


def _elements(weight: Weight) -> torch.Tensor:
    if isinstance(weight, PackedWeight):
        return weight.tiles
    return weight.codes if isinstance(weight, BlockWeight) else weight


def _stored(weight: Weight) -> StoredWeight:
    if isinstance(weight, PackedWeight):
        raise ValueError("an MLP that is packed in part: pack all of them, or none")
    return weight


def _packed(mlp: MlpWeights) -> tuple[PackedWeight, PackedWeight]:
    if not isinstance(mlp.gate_up, PackedWeight) or not isinstance(mlp.down, PackedWeight):
        raise ValueError("an MLP that is packed in part: pack all of them, or none")
    return mlp.gate_up, mlp.down


def swiglu_mlp(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) for x [T, H]; row-invariant."""
    if isinstance(weights.gate_up, PackedWeight):
        return SwigluKernel(*_packed(weights))(x.contiguous()).to(x.dtype)
    gate_up = linear(x, weights.gate_up)
    if isinstance(weights.down, BlockWeight):
        return block_gemm(silu_mul_quantize(gate_up), weights.down, x.dtype)
    return linear(silu_mul(gate_up), weights.down)


def grouped_mlp(
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    weights: ExpertWeights,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run each (token, expert) pair through its expert.

    Args:
        hidden_states: [T, H], each token once however many of its experts are here.
        rows: [P] integers, the token of each pair.
        slots: [P] integers in ascending order, the slot of each pair; only slots that occur are read.
        weights: the MLP in each slot.
        out: where to write the result, if anywhere: [P, H] in hidden_states' dtype, contiguous.

    Returns:
        [P, H] in hidden_states' dtype, in the order of the pairs; each row has the bits of `swiglu_mlp` of it alone.

    Raises:
        KeyError, IndexError: a slot is empty, a row is out of range. On a GPU nobody looks, since that would wait for the
            device: an empty slot gives NaN, a slot past the last one rows of undefined contents, and rows must be in range.
    """
    if weights.packed is not None:
        return weights.packed.grouped(hidden_states, rows, slots, out=out)
    if not uses_triton(hidden_states, rows, slots):
        return grouped_mlp_reference(hidden_states, rows, slots, weights, out=out)
    pairs = rows.shape[0]
    if pairs == 0:
        return torch.empty_like(hidden_states[:0]) if out is None else out
    if weights.tables is None:
        raise ValueError(f"{pairs} pairs, but no expert on {hidden_states.device}")
    gate_up, down = weights.tables
    tile = token_tile(pairs, weights.num_slots, gate_up.dtype)
    schedule = schedule_tiles(slots, weights.num_slots, tile)
    x = quantize_rows(hidden_states) if gate_up.quantized else hidden_states.contiguous()
    product = grouped_gemm(x, rows, gate_up, schedule, pairs, tile, hidden_states.dtype)
    middle = silu_mul_quantize(product) if down.quantized else silu_mul(product)
    outputs = grouped_gemm(middle, None, down, schedule, pairs, tile, hidden_states.dtype)
    return outputs if out is None else out.copy_(outputs)


def grouped_mlp_reference(
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    weights: Mapping[int, MlpWeights],
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_mlp` one expert at a time."""
    output = hidden_states.new_empty((rows.shape[0], hidden_states.shape[1])) if out is None else out
    present, counts = torch.unique_consecutive(slots, return_counts=True)
    gathered = hidden_states.index_select(0, rows)
    start = 0
    for slot, count in zip(present.tolist(), counts.tolist(), strict=True):
        output[start : start + count] = swiglu_mlp(gathered[start : start + count], weights[slot])
        start += count
    return output
