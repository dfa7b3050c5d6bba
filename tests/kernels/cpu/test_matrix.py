from __future__ import annotations

import threading

import pytest
import torch

from moray.kernels.cpu.library import Instructions, NativeLibrary
from moray.kernels.cpu.matrix import linear, pack, unpack
from moray.kernels.fp8 import BlockWeight, StoredWeight, decode_e4m3, dequantize_blocks, quantize_blocks
from moray.kernels.packed import PackedWeight

FP8 = torch.float8_e4m3fn
KINDS = (FP8, torch.bfloat16, torch.float32)
SHAPES = ((576, 256), (160, 132), (16, 1156), (70, 128), (33, 4), (1, 8))
"""Whole and ragged tiles, groups of tiles, blocks of columns and panels of decoded ones."""


def stored(rows: int, columns: int, kind: torch.dtype) -> StoredWeight:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) / columns**0.5
    return BlockWeight(*quantize_blocks(values)) if kind == FP8 else values.to(kind)


def plain(weight: StoredWeight) -> torch.Tensor:
    return dequantize_blocks(weight.codes, weight.scale_inv) if isinstance(weight, BlockWeight) else weight.float()


def tokens(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()


def bits(weight: PackedWeight) -> torch.Tensor:
    return weight.tiles.view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_matrix_holds_the_stored_one(
    library: NativeLibrary, shape: tuple[int, int], kind: torch.dtype
) -> None:
    weight = stored(*shape, kind)
    packed = pack(weight)
    assert (packed.rows, packed.columns) == shape
    assert packed.tiles.nbytes == library.packed_bytes(*shape, KINDS.index(kind))
    assert torch.equal(unpack(packed), plain(weight))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_fp32(instructions: Instructions, shape: tuple[int, int], kind: torch.dtype) -> None:
    """Nothing is rounded on the way but fp32 sums: a few ulps of the largest of the terms."""
    weight, x = stored(*shape, kind), tokens(14, shape[1])
    expected = x.double() @ plain(weight).double().T
    found = linear(x, pack(weight), torch.float32)
    assert (found - expected).abs().max() <= 4e-6 * expected.abs().max()
    assert torch.equal(linear(x, pack(weight), torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_has_the_same_bits_in_every_batch(
    instructions: Instructions, library: NativeLibrary, kind: torch.dtype
) -> None:
    weight, x = pack(stored(176, 1156, kind)), tokens(200, 1156)
    library.set_threads(1)
    whole = linear(x, weight, torch.float32)
    for threads in (1, 2, 3):
        library.set_threads(threads)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18, 28, 29, 199, 200):
            assert torch.equal(linear(x[:count], weight, torch.float32), whole[:count]), (threads, count)
            assert torch.equal(linear(x[-count:], weight, torch.float32), whole[-count:]), (threads, count)


def test_every_code_is_decoded_exactly(instructions: Instructions) -> None:
    """Sixteen ones in each row pick a code each; scales are one."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    columns = torch.zeros(len(codes), 4, dtype=torch.uint8)
    for column in range(4):
        columns.zero_()
        columns[:, column] = codes
        weight = BlockWeight(columns.view(FP8).clone(), torch.ones(2, 1))
        x = torch.zeros(1, 4, dtype=torch.bfloat16)
        x[0, column] = 1.0
        for rows in (1, 20, 40):  # decoded on the way, for many rows at once, and beforehand
            found = linear(x.expand(rows, 4), pack(weight), torch.float32)
            assert torch.equal(found[-1], decode_e4m3(codes.view(FP8)))


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_small_codes_count_where_a_thread_takes_small_numbers_for_zero(
    instructions: Instructions, library: NativeLibrary, rows: int
) -> None:
    """As after loading a library built with -ffast-math; threads inherit it."""
    codes = torch.arange(8, dtype=torch.uint8).repeat(640, 16).view(FP8)  # zero, and all subnormal ones
    x = torch.ones(rows, 128, dtype=torch.bfloat16)
    weight = pack(BlockWeight(codes, torch.ones(5, 1)))
    found: list[torch.Tensor] = []

    def compute() -> None:
        assert torch.set_flush_denormal(True)
        library.set_threads(3)  # some of which may be started from here
        found.append(linear(x, weight, torch.float32))
        assert torch.tensor(1e-39) * 1.0 == 0.0, "the thread is no longer as it was"

    caller = threading.Thread(target=compute)
    caller.start()
    caller.join(60)
    assert len(found) == 1
    assert torch.equal(found[0], torch.full((rows, 640), 16 * 28 / 512))


def test_scales_are_those_of_their_blocks(instructions: Instructions) -> None:
    codes = torch.full((300, 260), 0x38, dtype=torch.uint8).view(FP8)  # ones
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
    found = linear(torch.ones(1, 260, dtype=torch.bfloat16), pack(BlockWeight(codes, scales)), torch.float32)[0]
    expected = (scales * torch.tensor([128.0, 128.0, 4.0])).sum(1)
    assert found.tolist() == [float(expected[row // 128]) for row in range(300)]


def test_nan_stays_in_its_row(instructions: Instructions) -> None:
    weight, x = pack(stored(48, 128, FP8)), tokens(9, 128)
    clean = linear(x, weight, torch.bfloat16)
    x[4, 77] = float("nan")
    found = linear(x, weight, torch.bfloat16)
    assert found[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found[others], clean[others])


def test_threads_of_the_caller_do_not_disturb_each_other(library: NativeLibrary) -> None:
    """One has the pool, the others compute by themselves: the same bits."""
    weight, x = pack(stored(576, 256, FP8)), tokens(40, 256)
    library.set_threads(2)
    expected = linear(x, weight, torch.float32)
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            if not torch.equal(linear(x, weight, torch.float32), expected):
                wrong.append(number)

    callers = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert not wrong


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6 columns.*multiples of 4"):
        pack(torch.zeros(16, 6))
    with pytest.raises(ValueError, match="float16"):
        pack(torch.zeros(16, 8, dtype=torch.float16))
