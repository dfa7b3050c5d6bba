"""Which cached rows the queries of a step attend to, laid out once for all layers.

A plan is made of plain numbers, the segments of a batch, and is either tensors for the torch path or tensors for the Triton
kernels. The latter reach the device in one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .launch import uses_triton
from .mla_decode import SPLIT_KEYS
from .mla_prefill import PREFILL

QUERY_TILE = 32
"""Queries of one sequence that share a pass over its pages in the torch path: bounds the scores to 32 x heads x page rows."""

DECODED_QUERIES = 4
"""Segments of at most so many queries are tiles of one query each, on GPUs for decode's kernel: what is left of a prompt, or
drafted tokens, would give prefill's too few programs. The bits are the same."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The queries of one sequence in a batch.

    Attributes:
        start: row of its first query in the flattened batch.
        length: number of queries.
        position: position of its first query; keys 0 .. position + length - 1 are in the cache when attention runs.
        block_table: page of each `page_size` positions, in order; entries past the last needed page are never read.
    """

    start: int
    length: int
    position: int
    block_table: Sequence[int]

    def pages(self, page_size: int) -> Sequence[int]:
        """The pages its queries need."""
        return self.block_table[: -(-(self.position + self.length) // page_size)]

    def tiles(self, length: int) -> Iterable[Segment]:
        """The segment cut into pieces of at most `length` queries."""
        for offset in range(0, self.length, length):
            position = self.position + offset
            yield Segment(self.start + offset, min(length, self.length - offset), position, self.block_table)


@dataclass(frozen=True, slots=True)
class TorchTiles:
    """B tiles of at most `width` queries each for the torch path, those with the most keys first.

    Attributes:
        width: queries a tile, padded.
        page_counts: pages of each tile, descending: the tiles that still have a page j are a prefix.
        table: [B, page_counts[0]] int64, page numbers; 0 past a tile's last page.
        source: [B, width] int64, row of each query; rows past a tile's length repeat its last query.
        position: [B, width] int64, position of each query.
        kept: [B, width] bool, which of them are in the tile.
    """

    width: int
    page_counts: tuple[int, ...]
    table: torch.Tensor
    source: torch.Tensor
    position: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def build(cls, tiles: Iterable[Segment], width: int, page_size: int, device: torch.device) -> TorchTiles:
        """Lay out at least one tile."""
        ordered = sorted(tiles, key=lambda tile: -(tile.position + tile.length))
        pages = [tile.pages(page_size) for tile in ordered]
        table = torch.zeros((len(ordered), len(pages[0])), dtype=torch.int64)
        for i, needed in enumerate(pages):
            table[i, : len(needed)] = torch.as_tensor(needed, dtype=torch.int64)
        lengths = torch.tensor([tile.length for tile in ordered])[:, None]
        offset = torch.minimum(torch.arange(width)[None], lengths - 1)
        return cls(
            width=width,
            page_counts=tuple(len(needed) for needed in pages),
            table=table.to(device),
            source=(torch.tensor([tile.start for tile in ordered])[:, None] + offset).to(device),
            position=(torch.tensor([tile.position for tile in ordered])[:, None] + offset).to(device),
            kept=(torch.arange(width)[None] < lengths).to(device),
        )


@dataclass(frozen=True, slots=True)
class DeviceTiles:
    """Tiles of queries for the Triton kernels, int32; a tile is (row of its first query, its position, queries, sequence).

    Attributes:
        decode: [B, 4], tiles of one query.
        decode_table: [S, W], pages of the sequences in `decode`.
        prefill: [C, 4], tiles of prefill's size, those with the most keys first.
        prefill_table: [S', W'], pages of the sequences in `prefill`.
        prefill_pages: [N], each of those pages once.
        unpacked_table: [S', W'], `prefill_table` with the indices of its pages in `prefill_pages`.
        split_keys: keys a split.
        splits: splits of the longest sequence in `decode`.
    """

    decode: torch.Tensor
    decode_table: torch.Tensor
    prefill: torch.Tensor
    prefill_table: torch.Tensor
    prefill_pages: torch.Tensor
    unpacked_table: torch.Tensor
    split_keys: int
    splits: int

    @classmethod
    def build(cls, segments: Sequence[Segment], page_size: int, device: torch.device, split_keys: int) -> DeviceTiles:
        """Lay out the segments and copy everything to the device at once."""
        short = [segment for segment in segments if segment.length <= DECODED_QUERIES]
        long = [segment for segment in segments if segment.length > DECODED_QUERIES]
        decode = [
            (tile.start, tile.position, 1, sequence)
            for sequence, segment in enumerate(short)
            for tile in segment.tiles(1)
        ]
        prefill = [
            (tile.start, tile.position, tile.length, sequence)
            for sequence, segment in enumerate(long)
            for tile in segment.tiles(PREFILL.tiles["QUERIES"])
        ]
        prefill.sort(key=lambda tile: -(tile[1] + tile[2]))  # the longest first: the last programs to end are short
        place = {page: i for i, page in enumerate(dict.fromkeys(p for s in long for p in s.pages(page_size)))}
        tiles, table, chunks, chunk_table, distinct, unpacked = _copied(
            (
                _tiles(decode),
                _table([s.pages(page_size) for s in short]),
                _tiles(prefill),
                _table([s.pages(page_size) for s in long]),
                torch.tensor(list(place), dtype=torch.int32),
                _table([[place[page] for page in s.pages(page_size)] for s in long]),
            ),
            device,
        )
        keys = max((position + 1 for _, position, _, _ in decode), default=0)
        return cls(
            decode=tiles,
            decode_table=table,
            prefill=chunks,
            prefill_table=chunk_table,
            prefill_pages=distinct,
            unpacked_table=unpacked,
            split_keys=split_keys,
            splits=-(-keys // split_keys),
        )


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What `paged_mla_attention` needs to know of a batch; the same for every layer.

    Attributes:
        page_size: positions a page.
        tiles: for the path that runs on the device the plan was built for.
    """

    page_size: int
    tiles: tuple[TorchTiles, ...] | DeviceTiles

    @classmethod
    def build(
        cls,
        segments: Sequence[Segment],
        page_size: int,
        device: torch.device | str = "cpu",
        *,
        split_keys: int = SPLIT_KEYS,
    ) -> AttentionPlan:
        """Plan a batch.

        Args:
            segments: one per sequence; together they cover the rows of the batch. Empty ones are allowed.
            page_size: positions a page; any, but the kernels are fastest with multiples of 32.
            device: where the queries will be.
            split_keys: see `mla_decode.SPLIT_KEYS`; a multiple of the kernels' tile of keys.

        Raises:
            ValueError: a split length that the kernels do not take.
        """
        device = torch.device(device)
        segments = [segment for segment in segments if segment.length]
        if not uses_triton(torch.empty(0, device=device)):
            return cls(page_size, plan_for_torch(segments, page_size, device))
        if split_keys % PREFILL.tiles["KEYS"]:
            raise ValueError(f"splits of {split_keys} keys; they must be multiples of {PREFILL.tiles['KEYS']}")
        return cls(page_size, DeviceTiles.build(segments, page_size, device, split_keys))


def plan_for_torch(segments: Sequence[Segment], page_size: int, device: torch.device) -> tuple[TorchTiles, ...]:
    """Tiles for the torch path: those of one query, which need no padding, apart from the others."""
    decode = [tile for segment in segments if segment.length <= DECODED_QUERIES for tile in segment.tiles(1)]
    prefill = [tile for s in segments if s.length > DECODED_QUERIES for tile in s.tiles(QUERY_TILE)]
    return tuple(
        TorchTiles.build(tiles, width, page_size, device)
        for tiles, width in ((decode, 1), (prefill, QUERY_TILE))
        if tiles
    )


def _tiles(rows: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)


def _table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int32 [R, W], padded with zeros to a multiple of 16 columns: Triton compiles a kernel again for strides that are not."""
    table = torch.zeros((len(rows), -(-max(map(len, rows), default=0) // 16) * 16), dtype=torch.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.as_tensor(row, dtype=torch.int32)
    return table


def _copied(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int32 tensors on another device after one copy, each at a multiple of 16 bytes."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + -(-part.numel() // 4) * 4)
    together = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, part in zip(starts, parts, strict=False):
        together[start : start + part.numel()] = part.flatten()
    there = together.to(device, non_blocking=True)
    return [there[a : a + part.numel()].view(part.shape) for a, part in zip(starts, parts, strict=False)]
