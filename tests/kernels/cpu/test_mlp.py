from __future__ import annotations

import pytest
import torch

from moray.kernels.cpu.library import Instructions, NativeLibrary
from moray.kernels.cpu.matrix import pack, unpack
from moray.kernels.experts import ExpertWeights, MlpWeights, grouped_mlp, swiglu_mlp
from moray.kernels.fp8 import BlockWeight, quantize_blocks
from moray.kernels.packed import PackedWeight

FP8 = torch.float8_e4m3fn
HIDDEN, INTERMEDIATE = 200, 128


def packed(rows: int, columns: int, kind: torch.dtype, seed: int) -> PackedWeight:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    return pack(BlockWeight(*quantize_blocks(values)) if kind == FP8 else values.to(kind))


def experts(kind: torch.dtype, slots: tuple[int, ...] = (0, 1, 3), intermediate: int = INTERMEDIATE) -> ExpertWeights:
    return ExpertWeights(
        {
            slot: MlpWeights(packed(2 * intermediate, HIDDEN, kind, slot), packed(HIDDEN, intermediate, kind, slot + 9))
            for slot in slots
        }
    )


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def by_formula(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """In fp64, the middle rounded to bf16 as the kernel rounds it."""
    assert isinstance(weights.gate_up, PackedWeight)
    assert isinstance(weights.down, PackedWeight)
    gate, up = (x.double() @ unpack(weights.gate_up).double().T).chunk(2, dim=-1)
    middle = (gate / (1 + torch.exp(-gate)) * up).bfloat16()
    return middle.double() @ unpack(weights.down).double().T


@pytest.mark.parametrize("kind", [FP8, torch.bfloat16], ids=str)
def test_pairs_go_through_their_experts(instructions: Instructions, kind: torch.dtype) -> None:
    """To bf16's rounding of the result, and of a middle value that lies on the border of two."""
    by_slot, x = experts(kind), hidden(6)
    rows, slots = torch.tensor([5, 0, 2, 5, 1]), torch.tensor([0, 0, 1, 3, 3])
    found = grouped_mlp(x, rows, slots, by_slot)
    elsewhere = torch.full((7, HIDDEN), float("nan"), dtype=torch.bfloat16)
    assert grouped_mlp(x, rows, slots, by_slot, out=elsewhere[1:6]).data_ptr() == elsewhere[1].data_ptr()
    assert torch.equal(elsewhere[1:6], found)
    assert elsewhere[[0, 6]].isnan().all()
    for row, slot, output in zip(rows.tolist(), slots.tolist(), found, strict=True):
        expected = by_formula(x[row : row + 1], by_slot[slot])[0]
        assert (output.double() - expected).abs().max() <= 2**-7 * expected.abs().max()
        assert torch.equal(output, swiglu_mlp(x[row : row + 1], by_slot[slot])[0])


def test_gate_and_up_of_ragged_groups_stay_together(instructions: Instructions) -> None:
    """Five tiles of the intermediate size: the up projection's begin within a group, whose first one is the gate's last."""
    by_slot, x = experts(torch.bfloat16, (0,), intermediate=80), hidden(3)
    expected = by_formula(x, by_slot[0])
    assert (swiglu_mlp(x, by_slot[0]).double() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("kind", [FP8, torch.bfloat16], ids=str)
def test_a_pair_has_the_same_bits_in_every_batch(
    instructions: Instructions, library: NativeLibrary, kind: torch.dtype
) -> None:
    by_slot, x = experts(kind), hidden(250)
    slots = torch.tensor([0] * 210 + [1] * 9 + [3] * 31)
    rows = torch.arange(250)
    library.set_threads(1)
    whole = grouped_mlp(x, rows, slots, by_slot)
    for threads in (1, 2, 3):
        library.set_threads(threads)
        assert torch.equal(grouped_mlp(x, rows, slots, by_slot), whole)
        for some in ([0], [209, 210], list(range(205, 225)), [3, 100, 218, 219, 249]):
            found = grouped_mlp(x, rows[some], slots[some], by_slot)
            assert torch.equal(found, whole[some]), (threads, some)


def test_nothing_else_is_read(instructions: Instructions) -> None:
    by_slot, x = experts(FP8), hidden(4)
    rows, slots = torch.tensor([1, 3]), torch.tensor([0, 3])
    expected = grouped_mlp(x, rows, slots, by_slot)
    x[0] = x[2] = float("nan")
    for weight in (by_slot[1].gate_up, by_slot[1].down):
        assert isinstance(weight, PackedWeight)
        weight.tiles.view(torch.uint8).fill_(0x7F)
    assert torch.equal(grouped_mlp(x, rows, slots, by_slot), expected)


def test_no_pairs_give_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert grouped_mlp(hidden(2), none, none, experts(FP8)).shape == (0, HIDDEN)


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_that_are_none_are_refused(row: int) -> None:
    with pytest.raises(IndexError, match=rf"\[0, {row}\] of 2 tokens"):
        grouped_mlp(hidden(2), torch.tensor([0, row]), torch.tensor([0, 1]), experts(FP8))


@pytest.mark.parametrize("slot", [2, 4, 1000])
def test_empty_slots_are_refused(slot: int) -> None:
    with pytest.raises(KeyError, match=rf"{slot}.*\[0, 1, 3\] hold an expert"):
        grouped_mlp(hidden(2), torch.tensor([0, 1]), torch.tensor([0, slot]), experts(FP8))


def test_an_mlp_packed_in_part_is_refused() -> None:
    with pytest.raises(ValueError, match="packed in part"):
        ExpertWeights({0: MlpWeights(packed(256, 200, FP8, 0), torch.zeros(200, 128))})
