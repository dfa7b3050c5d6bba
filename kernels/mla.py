"""Absorbed multi-head latent attention over a paged cache.

The up-projections of keys and values are absorbed into the query and the output, so that all heads attend to the one
cached latent row a token (DeepSeek-V2 report, section 2.1, arXiv:2405.04434). The softmax runs over one page of keys at a
time in a fixed order (online softmax: Milakov and Gimelshein, 2018, arXiv:1805.02867): the result of a query depends on
its own position and keys alone, not on the batch, the chunking of the prompt or the length of other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .linear import padded_rows

QUERY_TILE = 32
"""Queries of one sequence that share a pass over its pages in prefill: bounds the scores to 32 x heads x page rows."""


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


def paged_mla_attention(
    queries: torch.Tensor, pages: torch.Tensor, segments: Sequence[Segment], *, value_dim: int, softmax_scale: float
) -> torch.Tensor:
    """Causal attention of every query to its own sequence's cached rows.

    Args:
        queries: [T, heads, D], absorbed, rotated part last.
        pages: [P, page_size, D]; rows that no query may see are not read, whatever they hold.
        segments: one per sequence; together they cover the T rows.
        value_dim: the first `value_dim` columns of a cached row are also its value.
        softmax_scale: multiplies the scores.

    Returns:
        [T, heads, value_dim] in queries' dtype.
    """
    output = torch.empty((*queries.shape[:2], value_dim), dtype=queries.dtype, device=queries.device)
    decode = [segment for segment in segments if segment.length == 1]
    prefill = [tile for segment in segments if segment.length > 1 for tile in _tiles(segment)]
    for tiles, width in ((decode, 1), (prefill, QUERY_TILE)):
        if tiles:
            _attend(queries, pages, tiles, width, value_dim, softmax_scale, output)
    return output


def _tiles(segment: Segment) -> list[Segment]:
    return [
        Segment(
            start=segment.start + offset,
            length=min(QUERY_TILE, segment.length - offset),
            position=segment.position + offset,
            block_table=segment.block_table,
        )
        for offset in range(0, segment.length, QUERY_TILE)
    ]


def _attend(
    queries: torch.Tensor,
    pages: torch.Tensor,
    tiles: list[Segment],
    width: int,
    value_dim: int,
    softmax_scale: float,
    output: torch.Tensor,
) -> None:
    """Attend for tiles of at most `width` queries each, writing into `output`. B tiles, M = width x heads (padded) rows."""
    device, page_size = queries.device, pages.shape[1]
    heads = queries.shape[1]
    # Longest first: the tiles that still have a page j are then a prefix, and the loop over j needs no index lists.
    tiles = sorted(tiles, key=lambda tile: -(tile.position + tile.length))
    page_counts = [-(-(tile.position + tile.length) // page_size) for tile in tiles]
    table = torch.zeros((len(tiles), page_counts[0]), dtype=torch.int64)
    for i, tile in enumerate(tiles):
        table[i, : page_counts[i]] = torch.as_tensor(tile.block_table[: page_counts[i]], dtype=torch.int64)
    table = table.to(device)
    # Rows past a tile's length repeat its last query; their results are dropped.
    offset = torch.arange(width)
    lengths = torch.tensor([tile.length for tile in tiles])[:, None]
    offset = torch.minimum(offset[None], lengths - 1)
    source = (torch.tensor([tile.start for tile in tiles])[:, None] + offset).to(device)
    position = (torch.tensor([tile.position for tile in tiles])[:, None] + offset).to(device)
    last = position[:, -1]
    rows = padded_rows(width * heads)
    query = functional.pad(queries[source].flatten(1, 2), (0, 0, 0, rows - width * heads))
    visible_to = functional.pad(position.repeat_interleave(heads, dim=1), (0, rows - width * heads))

    peak = torch.full((len(tiles), rows, 1), float("-inf"), dtype=torch.float32, device=device)
    mass = torch.zeros((len(tiles), rows, 1), dtype=torch.float32, device=device)
    total = torch.zeros((len(tiles), rows, value_dim), dtype=torch.float32, device=device)
    active = len(tiles)
    for j in range(page_counts[0]):
        while page_counts[active - 1] <= j:
            active -= 1
        key_position = j * page_size + torch.arange(page_size, device=device)
        # Rows beyond the sequence may hold anything, NaN included, and zero times NaN is NaN: clear them.
        keys = pages[table[:active, j]].masked_fill_((key_position > last[:active, None]).unsqueeze(-1), 0.0)
        scores = torch.bmm(query[:active], keys.transpose(1, 2)).float() * softmax_scale
        scores.masked_fill_(key_position > visible_to[:active, :, None], float("-inf"))
        old_peak = peak[:active]
        new_peak = torch.maximum(old_peak, scores.amax(-1, keepdim=True))
        weight = torch.exp(scores - new_peak)
        fade = torch.exp(old_peak - new_peak)
        mass[:active] = mass[:active] * fade + weight.sum(-1, keepdim=True)
        value = torch.bmm(weight.to(keys.dtype), keys[..., :value_dim])
        total[:active] = total[:active] * fade + value.float()
        peak[:active] = new_peak
    result = (total / mass)[:, : width * heads].unflatten(1, (width, heads)).to(output.dtype)
    if width == 1:
        output[source[:, 0]] = result[:, 0]
        return
    kept = torch.arange(width, device=device)[None] < lengths.to(device)
    output[source[kept]] = result[kept]
