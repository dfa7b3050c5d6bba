from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moray.kernels.experts import ExpertWeights, MlpWeights, grouped_mlp, grouped_mlp_reference, swiglu_mlp
from moray.kernels.fp8 import BlockWeight, StoredWeight, Weight, dequantize_blocks, quantize_blocks
from moray.kernels.packed import PackedWeight

FP8 = torch.float8_e4m3fn
HIDDEN, INTERMEDIATE = 200, 128


def mlp(seed: int, dtype: torch.dtype, device: torch.device) -> MlpWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(n: int, k: int) -> StoredWeight:
        values = torch.randn(n, k, generator=generator) / k**0.5
        return BlockWeight(*quantize_blocks(values)).to(device) if dtype == FP8 else values.to(device, dtype)

    return MlpWeights(matrix(2 * INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE))


def hidden(tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    return x.to(device, torch.bfloat16 if dtype == FP8 else dtype)


def plain(weight: Weight) -> torch.Tensor:
    assert not isinstance(weight, PackedWeight)
    return dequantize_blocks(weight.codes, weight.scale_inv) if isinstance(weight, BlockWeight) else weight.float()


def in_fp32(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """The formula, with nothing rounded."""
    gate, up = (x.float() @ plain(weights.gate_up).T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up @ plain(weights.down).T


PAIRS = [(3, 0), (0, 0), (5, 4), (5, 5), (1, 5), (4, 5), (0, 5)]  # (row, slot); slots 1 and 9 have none


def run(x: torch.Tensor, pairs: list[tuple[int, int]], weights: ExpertWeights) -> torch.Tensor:
    rows, slots = torch.tensor(pairs, dtype=torch.int32, device=x.device).unbind(1)
    return grouped_mlp(x, rows, slots, weights)


@pytest.mark.parametrize(
    ("dtype", "architecture"), [(FP8, 80), (FP8, 90), (torch.bfloat16, 90), (torch.float32, 90)], ids=str
)
def test_bits_of_swiglu_mlp_one_row_at_a_time(
    dtype: torch.dtype, architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    as_architecture(architecture)
    weights = ExpertWeights({slot: mlp(slot, dtype, device) for slot in (0, 1, 4, 5, 9)})
    x = hidden(6, dtype, device)
    outputs = run(x, PAIRS, weights)
    assert (outputs.shape, outputs.dtype) == ((len(PAIRS), HIDDEN), x.dtype)
    alone = (1, 4) if dtype == torch.float32 else range(len(PAIRS))  # the interpreter needs a second for each in fp32
    for row, slot, output in ((*PAIRS[pair], outputs[pair]) for pair in alone):
        assert torch.equal(output, swiglu_mlp(x[row : row + 1], weights[slot])[0]), (row, slot)


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float32], ids=str)
def test_against_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    """FP8: 4 bits an activation, twice, over a few hundred terms; bf16: three roundings to 8 bits; fp32: order of sums."""
    weights = ExpertWeights({slot: mlp(slot, dtype, device) for slot in (0, 1, 4, 5, 9)})
    x = hidden(6, dtype, device)
    outputs = run(x, PAIRS, weights).float()
    expected = torch.cat([in_fp32(x[row : row + 1], weights[slot]) for row, slot in PAIRS])
    tolerance = {FP8: 0.1, torch.bfloat16: 0.01, torch.float32: 1e-6}[dtype]
    assert ((outputs - expected).norm(dim=1) / expected.norm(dim=1)).max() < tolerance


def test_the_reference_says_the_same(device: torch.device) -> None:
    weights = ExpertWeights({slot: mlp(slot, FP8, device) for slot in (0, 4, 5)})
    x = hidden(6, FP8, device)
    rows, slots = torch.tensor(PAIRS, device=device).unbind(1)
    assert torch.equal(grouped_mlp_reference(x, rows, slots, weights), grouped_mlp(x, rows, slots, weights))


@pytest.mark.parametrize("pairs", [9, 17, 33])
def test_rows_do_not_depend_on_how_many_there_are(pairs: int, device: torch.device) -> None:
    """One slot, so that the token tile grows with the pairs."""
    weights = ExpertWeights({0: mlp(0, FP8, device)})
    x = hidden(33, FP8, device)
    some = run(x, [(row, 0) for row in range(33 - pairs, 33)], weights)
    for pair in (0, pairs // 2, pairs - 1):
        assert torch.equal(some[pair], swiglu_mlp(x[33 - pairs + pair : 34 - pairs + pair], weights[0])[0])


def test_experts_without_tokens_and_tokens_without_experts_are_not_read(device: torch.device) -> None:
    by_slot = {slot: mlp(slot, torch.bfloat16, device) for slot in range(3)}
    x = hidden(4, torch.bfloat16, device)
    expected = run(x, [(2, 1)], ExpertWeights(by_slot))
    for poisoned in (by_slot[0].gate_up, by_slot[0].down, by_slot[2].gate_up, by_slot[2].down):
        assert isinstance(poisoned, torch.Tensor)
        poisoned.fill_(float("nan"))
    x[[0, 1, 3]] = float("nan")
    assert torch.equal(run(x, [(2, 1)], ExpertWeights(by_slot)), expected)


def test_a_token_with_nan_makes_its_own_pairs_nan(device: torch.device) -> None:
    weights = ExpertWeights({slot: mlp(slot, FP8, device) for slot in (0, 4, 5)})
    x = hidden(6, FP8, device)
    clean = run(x, PAIRS, weights)
    x[0, 3] = float("nan")
    outputs = run(x, PAIRS, weights)
    for pair, (row, _) in enumerate(PAIRS):
        assert outputs[pair].isnan().all() if row == 0 else torch.equal(outputs[pair], clean[pair])


def test_an_empty_slot_gives_nan(device: torch.device) -> None:
    weights = ExpertWeights({slot: mlp(slot, FP8, device) for slot in (0, 2)})
    outputs = run(hidden(1, FP8, device), [(0, 0), (0, 1), (0, 2)], weights)
    assert outputs.isfinite().all(dim=1).tolist() == [True, False, True]
    assert outputs[1].isnan().all()


def test_no_pairs_and_no_experts(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int32, device=device)
    for weights in (ExpertWeights({}), ExpertWeights({3: mlp(0, FP8, device)})):
        assert grouped_mlp(hidden(2, FP8, device), none, none, weights).shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="1 pairs, but no expert"):
        run(hidden(2, FP8, device), [(0, 0)], ExpertWeights({}))


def test_sets_share_memory(device: torch.device) -> None:
    """A placement epoch adds an expert and moves one: nothing is copied, and both sets serve."""
    experts = [mlp(seed, FP8, device) for seed in range(3)]
    old, new = ExpertWeights({0: experts[0], 1: experts[1]}), ExpertWeights({0: experts[1], 7: experts[2]})
    assert old.tables is not None
    assert new.tables is not None
    assert old.tables[0].addresses[1] == new.tables[0].addresses[0]
    assert (new[7], list(new), len(new), new.num_slots) == (experts[2], [0, 7], 2, 8)
    x = hidden(1, FP8, device)
    assert torch.equal(run(x, [(0, 1)], old), run(x, [(0, 0)], new))
