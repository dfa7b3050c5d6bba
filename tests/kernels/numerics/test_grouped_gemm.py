from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moray.kernels.block_gemm import block_gemm, block_gemm_reference
from moray.kernels.fp8 import BlockWeight, QuantizedRows, StoredWeight, quantize_blocks
from moray.kernels.grouped_gemm import (
    WeightTable,
    grouped_gemm,
    max_tiles,
    schedule_tiles,
    schedule_tiles_reference,
    token_tile,
)
from moray.kernels.quantize import quantize_rows_reference

FP8 = torch.float8_e4m3fn


def matrix(n: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> StoredWeight:
    """Blocks of very different sizes, so that a wrong scale shows."""
    generator = torch.Generator().manual_seed(n * 10007 + k * 101 + seed)
    blocks = torch.rand(-(-n // 128), -(-k // 128), generator=generator) * 3 + 0.1
    values = torch.randn(n, k, generator=generator)
    values *= blocks.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    if dtype != FP8:
        return values.to(device, dtype)
    codes, scale_inv = quantize_blocks(values)
    return BlockWeight(codes, scale_inv).to(device)


def tokens(count: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | QuantizedRows:
    generator = torch.Generator().manual_seed(count * 10007 + k)
    x = torch.randn(count, k, generator=generator) * (torch.rand(count, 1, generator=generator) * 4 + 0.1)
    if dtype != FP8:
        return x.to(device, dtype)
    quantized = quantize_rows_reference(x)
    return QuantizedRows(quantized.codes.to(device), quantized.scales.to(device))


def row_of(x: torch.Tensor | QuantizedRows, row: int) -> torch.Tensor | QuantizedRows:
    if isinstance(x, QuantizedRows):
        return QuantizedRows(x.codes[row : row + 1], x.scales[row : row + 1])
    return x[row : row + 1]


def reference(
    x: torch.Tensor | QuantizedRows,
    rows: list[int],
    slots: list[int],
    by_slot: dict[int, StoredWeight],
    dtype: torch.dtype,
) -> torch.Tensor:
    """One pair at a time, in fp32."""
    outputs = []
    for row, slot in zip(rows, slots, strict=True):
        one, weight = row_of(x, row), by_slot[slot]
        if isinstance(one, QuantizedRows):
            assert isinstance(weight, BlockWeight)
            outputs.append(block_gemm_reference(one, weight, torch.float32))
        else:
            assert isinstance(weight, torch.Tensor)
            outputs.append(one.float() @ weight.float().T)
    return torch.cat(outputs).to(dtype)


def run(
    x: torch.Tensor | QuantizedRows,
    rows: list[int] | None,
    slots: list[int],
    by_slot: dict[int, StoredWeight],
    tile: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    table = WeightTable(by_slot)
    device = table.addresses.device
    schedule = schedule_tiles(torch.tensor(slots, device=device), table.num_slots, tile)
    gathered = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    return grouped_gemm(x, gathered, table, schedule, len(slots), tile, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of a few hundred products in fp32 in another order; one rounding more for bf16 results."""
    tolerance = 2**-8 if actual.dtype == torch.bfloat16 else 2**-18
    largest = expected.float().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=largest * 2**-18)


@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize(
    ("slots", "num_slots"),
    [
        ([0], 1),
        ([2] * 5, 3),
        ([0] * 16 + [1] * 17 + [4] * 129, 6),
        ([3], 257),
        (sorted([0, 1, 1, 30, 31, 31, 31]), 32),
        (list(range(40)), 40),
        ([-2, -1, 0, 1, 1, 3, 10**6], 3),
    ],
    ids=lambda value: str(value)[:20],
)
def test_schedule(slots: list[int], num_slots: int, tile: int, device: torch.device) -> None:
    pairs = torch.tensor(slots, device=device)
    schedule = schedule_tiles(pairs, num_slots, tile)
    assert schedule.shape == (3, max_tiles(len(slots), num_slots, tile))
    assert torch.equal(schedule.cpu(), schedule_tiles_reference(pairs.cpu(), num_slots, tile))


def test_the_grid_has_room_for_the_worst_case() -> None:
    """Every distribution of a few pairs over slots needs at most `max_tiles`, and one of them needs as many."""
    for pairs in range(1, 12):
        for num_slots in range(1, 5):
            for tile in (2, 3):
                worst = max(sum(-(-count // tile) for count in counts) for counts in _distributions(pairs, num_slots))
                assert worst == max_tiles(pairs, num_slots, tile), (pairs, num_slots, tile)


def _distributions(pairs: int, num_slots: int) -> list[list[int]]:
    if num_slots == 1:
        return [[pairs]]
    return [[n, *rest] for n in range(pairs + 1) for rest in _distributions(pairs - n, num_slots - 1)]


def test_tiles_grow_with_the_pairs() -> None:
    sizes = [token_tile(pairs, 32, FP8) for pairs in (1, 256, 257, 512, 1024, 1025, 10**6)]
    assert sizes == [16, 16, 32, 32, 64, 128, 128]
    assert token_tile(10**6, 32, torch.float32) == 16


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("n", "k"), [(128, 256), (96, 200), (40, 128), (130, 16), (64, 300)], ids=lambda size: str(size)
)
def test_fp8(n: int, k: int, architecture: int, device: torch.device, as_architecture: Callable[[int], None]) -> None:
    as_architecture(architecture)
    by_slot = {slot: matrix(n, k, FP8, device, slot) for slot in (0, 2, 5)}
    x = tokens(7, k, FP8, device)
    rows, slots = [6, 0, 3, 3, 5, 1, 2, 4], [0, 0, 2, 5, 5, 5, 5, 5]
    close(run(x, rows, slots, by_slot, 16), reference(x, rows, slots, by_slot, torch.float32))
    close(run(x, rows, slots, by_slot, 16, torch.bfloat16), reference(x, rows, slots, by_slot, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(128, 256), (96, 200), (40, 16)], ids=lambda size: str(size))
def test_unquantised(n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    by_slot = {slot: matrix(n, k, dtype, device, slot) for slot in (0, 2, 5)}
    x = tokens(7, k, dtype, device)
    rows, slots = [6, 0, 3, 3, 5, 1, 2, 4], [0, 0, 2, 5, 5, 5, 5, 5]
    close(run(x, rows, slots, by_slot, 16, dtype), reference(x, rows, slots, by_slot, dtype))


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_tile_and_alone(dtype: torch.dtype, device: torch.device) -> None:
    by_slot = {slot: matrix(64, 300, dtype, device, slot) for slot in (1, 3)}
    slots = [1] * 37 + [3] * 132
    x = tokens(len(slots), 300, dtype, device)
    whole = run(x, None, slots, by_slot, 16)
    for tile in (32, 64, 128):
        assert torch.equal(run(x, None, slots, by_slot, tile), whole), f"tile {tile}"
    for row in (0, 36, 37, 168):
        alone = run(x, [row], slots[row : row + 1], by_slot, 16)
        assert torch.equal(alone[0], whole[row])
        one, weight = row_of(x, row), by_slot[slots[row]]
        if isinstance(one, QuantizedRows) and isinstance(weight, BlockWeight):
            assert torch.equal(block_gemm(one, weight, torch.float32)[0], whole[row])


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
def test_nothing_else_is_read(dtype: torch.dtype, device: torch.device) -> None:
    """Experts without tokens hold NaN, and so do tokens that no pair names; neighbours of every matrix are NaN too."""
    by_slot = {slot: matrix(70, 150, dtype, device, slot) for slot in range(4)}
    x = tokens(6, 150, dtype, device)
    rows, slots = [1, 4, 1], [0, 2, 2]
    expected = run(x, rows, slots, by_slot, 16)
    for weight in (by_slot[1], by_slot[3]):
        if isinstance(weight, BlockWeight):
            weight.scale_inv.fill_(float("nan"))
            weight.codes.view(torch.uint8).fill_(0x7F)
        else:
            weight.fill_(float("nan"))
    for row in (0, 2, 3, 5):
        if isinstance(x, QuantizedRows):
            x.scales[row], x.codes.view(torch.uint8)[row] = float("nan"), 0x7F
        else:
            x[row] = float("nan")
    found = run(x, rows, slots, by_slot, 16)
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, device: torch.device) -> None:
    by_slot = {0: matrix(32, 128, dtype, device)}
    x = tokens(4, 128, dtype, device)
    clean = run(x, None, [0] * 4, by_slot, 16)
    if isinstance(x, QuantizedRows):
        x.scales[1], x.scales[2] = float("nan"), float("inf")
    else:
        x[1, 5], x[2, 0] = float("nan"), float("inf")
    found = run(x, None, [0] * 4, by_slot, 16)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()


def test_zero_rows_give_zeros(device: torch.device) -> None:
    x = quantize_rows_reference(torch.zeros(2, 128))
    x = QuantizedRows(x.codes.to(device), x.scales.to(device))
    assert not run(x, None, [0, 0], {0: matrix(32, 128, FP8, device)}, 16).any()


def test_a_slot_without_a_matrix_gives_nan(device: torch.device) -> None:
    by_slot = {slot: matrix(40, 128, FP8, device, slot) for slot in (0, 2)}
    x = tokens(3, 128, FP8, device)
    found = run(x, None, [0, 1, 2], by_slot, 16)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], run(x, [0, 2], [0, 2], by_slot, 16))


def test_pairs_past_the_last_slot_are_left_out(device: torch.device) -> None:
    by_slot = {0: matrix(40, 128, FP8, device)}
    x = tokens(3, 128, FP8, device)
    assert torch.equal(run(x, None, [0, 0, 7], by_slot, 16)[:2], run(x, [0, 1], [0, 0], by_slot, 16))


def test_tables_of_unlike_matrices_are_refused(device: torch.device) -> None:
    good = torch.zeros(32, 48, device=device)
    with pytest.raises(ValueError, match=r"slot 1 holds \[32, 40\]"):
        WeightTable({0: good, 1: torch.zeros(32, 40, device=device)})
    with pytest.raises(ValueError, match=r"slot 1 holds .* torch\.bfloat16"):
        WeightTable({0: good, 1: good.bfloat16()})
    with pytest.raises(ValueError, match="not contiguous"):
        WeightTable({0: good, 1: torch.zeros(48, 32, device=device).T})
    with pytest.raises(ValueError, match="not aligned"):
        WeightTable({0: good, 1: torch.zeros(32 * 48 + 1, device=device)[1:].view(32, 48)})
    with pytest.raises(ValueError, match=r"slots 0\.\.5000"):
        WeightTable({0: good, 5000: good})
    with pytest.raises(ValueError, match=r"slots -1\.\.0"):
        WeightTable({0: good, -1: good})
