"""SwiGLU MLPs over packed weights: one for all rows, and grouped by expert."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from ..packed import PackedWeight
from .library import Mlp, loaded
from .matrix import described


class MlpTable:
    """The MLPs in the slots of a layer, described to the library.

    Args:
        by_slot: slot -> (gate_up [2N, H], down [H, N]), all of one shape; kept alive by whoever holds the table.
        num_slots: one more than the largest slot.

    Attributes:
        hidden: H; 0 where there is no MLP.
        address: of the `moray_mlp` of slot 0; the others follow. Valid for as long as the table is there.
    """

    def __init__(self, by_slot: Mapping[int, tuple[PackedWeight, PackedWeight]], num_slots: int) -> None:
        self.num_slots = num_slots
        self.hidden = next((down.rows for _, down in by_slot.values()), 0)
        self._weights = dict(by_slot)
        self._mlps = (Mlp * max(1, num_slots))()
        for slot, (gate_up, down) in by_slot.items():
            self._mlps[slot] = Mlp(described(gate_up), described(down))
        self.address = ctypes.addressof(self._mlps)

    def grouped(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `kernels.experts.grouped_mlp`; hidden_states in bf16.

        Raises:
            IndexError: a row is out of range.
            KeyError: a slot is empty or out of range.
        """
        assert hidden_states.dtype == torch.bfloat16, hidden_states.dtype
        shape = rows.shape[0], hidden_states.shape[1]
        if out is None:
            out = torch.empty(shape, dtype=torch.bfloat16)
        assert (out.shape, out.dtype, out.is_contiguous()) == (shape, torch.bfloat16, True), (out.shape, out.dtype)
        hidden_states, rows, slots = hidden_states.contiguous(), rows.int().contiguous(), slots.int().contiguous()
        failed = loaded().grouped_mlp(
            hidden_states.data_ptr(),
            hidden_states.shape[0],
            rows.data_ptr(),
            slots.data_ptr(),
            rows.shape[0],
            self.address,
            self.num_slots,
            out.data_ptr(),
        )
        if failed == -1:
            raise IndexError(f"rows {rows.tolist()} of {hidden_states.shape[0]} tokens")
        if failed:
            raise KeyError(f"slots {sorted(set(slots.tolist()))}; {sorted(self._weights)} hold an expert")
        return out


class SwigluKernel:
    """One MLP for every row of a batch.

    Attributes:
        address: of its `moray_mlp`; valid for as long as the kernel is there.
    """

    def __init__(self, gate_up: PackedWeight, down: PackedWeight) -> None:
        self._weights = gate_up, down
        self._mlp = Mlp(described(gate_up), described(down))
        self.address = ctypes.addressof(self._mlp)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] contiguous bf16 to [T, H]: rounded to bf16 as an expert's output elsewhere would be, in fp32."""
        out = torch.empty(x.shape, dtype=torch.float32)
        loaded().swiglu(x.data_ptr(), x.shape[0], self.address, out.data_ptr())
        return out
