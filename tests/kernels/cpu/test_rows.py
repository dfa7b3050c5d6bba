"""Rows around the layers: of the embedding, behind a norm, and where tokens stand."""

from __future__ import annotations

import pytest
import torch

from moray.kernels.attention_plan import Segment
from moray.kernels.cpu.attention import BatchTables
from moray.kernels.cpu.library import Instructions, NativeLibrary
from moray.kernels.cpu.rows import rms_norm, rows_of
from moray.kernels.rms_norm import rms_norm_reference


@pytest.mark.parametrize("width", [16, 100, 1024, 7168])
def test_norms_are_those_of_the_definition_but_for_its_order_of_sums(
    instructions: Instructions, library: NativeLibrary, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(5, width, generator=generator) * 10.0).bfloat16()
    weight = torch.randn(width, generator=generator).bfloat16()
    found, expected = rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=0.0)  # one step of bf16, twice rounded
    assert float((found == expected).float().mean()) > 0.99


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_behind_a_norm_has_the_same_bits_alone_and_among_others(
    instructions: Instructions, library: NativeLibrary, threads: int
) -> None:
    """Of 300 rows, which threads share."""
    library.set_threads(threads)
    x, weight = torch.randn(300, 1000).bfloat16(), torch.randn(1000).bfloat16()
    together = rms_norm(x, weight, 1e-6)
    for row in (0, 7, 299):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])
    assert torch.equal(rms_norm(x.T.contiguous().T, weight, 1e-6), together)
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 1000)


def test_rows_of_a_table() -> None:
    table = torch.randn(50, 24).bfloat16()
    assert torch.equal(rows_of(table, [49, 0, 0, 7]), table[[49, 0, 0, 7]])
    assert rows_of(table, []).shape == (0, 24)


@pytest.mark.parametrize("number", [-1, 50, 1 << 40])
def test_a_row_that_a_table_does_not_have(number: int) -> None:
    with pytest.raises(IndexError, match=r"rows \S+ to \S+ of a table of 50"):
        rows_of(torch.zeros(50, 4), [3, number])


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_where_tokens_stand(page_size: int) -> None:
    """One in the middle of a sequence, several across pages, none at all."""
    rotations = torch.randn(200, 16, 2)
    tables = [torch.randperm(200).tolist() for _ in range(4)]
    places = [(1, 130), (70, 60), (0, 5), (3, 0)]
    segments, start = [], 0
    for (length, position), table in zip(places, tables, strict=True):
        segments.append(Segment(start, length, position, table))
        start += length
    found = BatchTables.of_segments(segments, rotations, page_size=page_size, row=576)
    positions = [p for length, first in places for p in range(first, first + length)]
    rows = [
        table[p // page_size] * page_size + p % page_size
        for (length, first), table in zip(places, tables, strict=True)
        for p in range(first, first + length)
    ]
    assert found.tokens == 74
    assert found.cache_rows.tolist() == rows
    assert torch.equal(found.rotation, rotations[positions])


def test_a_position_without_a_page() -> None:
    with pytest.raises(IndexError, match="2 pages of 8 positions"):
        BatchTables.of_segments([Segment(0, 1, 16, [5, 7])], torch.randn(200, 16, 2), page_size=8, row=576)


@pytest.mark.parametrize(("length", "position"), [(1, 200), (70, 131)])
def test_a_position_past_the_last_one(length: int, position: int) -> None:
    with pytest.raises(IndexError, match="positions past the 200"):
        BatchTables.of_segments(
            [Segment(0, length, position, range(300))], torch.randn(200, 16, 2), page_size=1, row=576
        )
