"""Absorbed multi-head latent attention over a paged cache.

The up-projections of keys and values are absorbed into the query and the output, so that all heads attend to the one
cached latent row a token (DeepSeek-V2 report, section 2.1, arXiv:2405.04434). The softmax runs over the keys in tiles, in a
fixed order (online softmax: Milakov and Gimelshein, 2018, arXiv:1805.02867): the result of a query depends on its own
position and keys alone, not on the batch, the chunking of the prompt or the length of other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from .attention_plan import AttentionPlan, DeviceTiles, TorchTiles, plan_for_torch
from .attention_plan import Segment as Segment  # for who imports it from here
from .kv_pages import KvFormat
from .mla_decode import decode
from .mla_prefill import prefill, unpack
from .padding import padded_rows


def paged_mla_attention(
    queries: torch.Tensor, pages: torch.Tensor, plan: AttentionPlan, *, value_dim: int, softmax_scale: float
) -> torch.Tensor:
    """Causal attention of every query to its own sequence's cached rows.

    A row that is not finite makes the queries that see it NaN. It may do so to earlier queries of its sequence that share a
    tile with one that sees it, and to no other sequence.

    Args:
        queries: [T, heads, D], absorbed, rotated part last.
        pages: [P, page_size, row], of queries' dtype or FP8 (see `KvFormat`), contiguous; rows that no query may see are not
            read, or what they hold is not used. On a GPU float32 is for small models: rows of 576 of them need more shared
            memory than most have.
        plan: of the batch, for these pages' size and queries' device.
        value_dim: the first `value_dim` columns of a cached row are also its value.
        softmax_scale: multiplies the scores.

    Returns:
        [T, heads, value_dim] in queries' dtype; rows that the plan does not cover are undefined.

    Raises:
        ValueError: pages of another size than the plan's, or of a width or dtype that does not suit the queries.
    """
    if pages.shape[1] != plan.page_size:
        raise ValueError(f"pages of {pages.shape[1]} positions, the plan is for {plan.page_size}")
    form = KvFormat.of(pages, kv_lora=value_dim, rope=queries.shape[-1] - value_dim)
    if not form.is_fp8 and pages.dtype != queries.dtype:
        raise ValueError(f"pages in {pages.dtype}, queries in {queries.dtype}")
    output = torch.empty((*queries.shape[:2], value_dim), dtype=queries.dtype, device=queries.device)
    if isinstance(plan.tiles, DeviceTiles):
        _attend_triton(queries.contiguous(), pages, plan.tiles, form, softmax_scale, output)
    else:
        for tiles in plan.tiles:
            _attend_torch(queries, pages, tiles, form, softmax_scale, output)
    return output


def paged_mla_attention_reference(
    queries: torch.Tensor, pages: torch.Tensor, segments: Sequence[Segment], *, value_dim: int, softmax_scale: float
) -> torch.Tensor:
    """`paged_mla_attention` in plain torch on any device."""
    segments = [segment for segment in segments if segment.length]
    plan = AttentionPlan(pages.shape[1], plan_for_torch(segments, pages.shape[1], queries.device))
    return paged_mla_attention(queries, pages, plan, value_dim=value_dim, softmax_scale=softmax_scale)


def _attend_triton(
    queries: torch.Tensor,
    pages: torch.Tensor,
    tiles: DeviceTiles,
    form: KvFormat,
    softmax_scale: float,
    output: torch.Tensor,
) -> None:
    split_keys = tiles.split_keys
    if len(tiles.decode):
        decode(
            queries,
            pages,
            tiles.decode_table,
            tiles.decode,
            output,
            form=form,
            split_keys=split_keys,
            splits=tiles.splits,
            softmax_scale=softmax_scale,
        )
    if len(tiles.prefill):
        table = tiles.prefill_table
        if form.is_fp8:
            pages = unpack(pages, tiles.prefill_pages, form, queries.dtype)
            form = KvFormat(form.kv_lora, form.rope, queries.dtype)
            table = tiles.unpacked_table
        prefill(
            queries,
            pages,
            table,
            tiles.prefill,
            output,
            form=form,
            split_keys=split_keys,
            softmax_scale=softmax_scale,
        )


def _attend_torch(
    queries: torch.Tensor,
    pages: torch.Tensor,
    tiles: TorchTiles,
    form: KvFormat,
    softmax_scale: float,
    output: torch.Tensor,
) -> None:
    """Attend for B tiles of M = width x heads (padded) rows, one page of keys at a time, writing into `output`."""
    device, page_size = queries.device, pages.shape[1]
    heads, width, value_dim = queries.shape[1], tiles.width, form.kv_lora
    rows = padded_rows(width * heads)
    last = tiles.position[:, -1]
    query = functional.pad(queries[tiles.source].flatten(1, 2), (0, 0, 0, rows - width * heads))
    visible_to = functional.pad(tiles.position.repeat_interleave(heads, dim=1), (0, rows - width * heads))

    active = len(tiles.page_counts)
    peak = torch.full((active, rows, 1), float("-inf"), dtype=torch.float32, device=device)
    mass = torch.zeros((active, rows, 1), dtype=torch.float32, device=device)
    total = torch.zeros((active, rows, value_dim), dtype=torch.float32, device=device)
    for j in range(tiles.page_counts[0]):
        while tiles.page_counts[active - 1] <= j:
            active -= 1
        key_position = j * page_size + torch.arange(page_size, device=device)
        keys = pages[tiles.table[:active, j]]
        if form.is_fp8:
            keys = form.decode(keys, queries.dtype)
        # Rows beyond the sequence may hold anything, NaN included, and zero times NaN is NaN: clear them.
        keys = keys.masked_fill_((key_position > last[:active, None]).unsqueeze(-1), 0.0)
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
        output[tiles.source[:, 0]] = result[:, 0]
    else:
        output[tiles.source[tiles.kept]] = result[tiles.kept]
