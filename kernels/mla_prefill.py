"""Triton kernel of absorbed latent attention for many queries of one sequence: prompts, and chunks of prompts.

Each program takes two neighbouring queries and 16 of their heads through all splits of their keys, with the arithmetic of
`mla_decode.py`, whose module text says why the bits are the same. Pages in FP8 are unpacked before it, each once, to rows
like those that decode makes of them in passing: every program of prefill would decode the same rows again, and a tile of them
takes more registers than prefill has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .cases import Case, Work
from .kv_pages import KvFormat
from .launch import Config, architecture, kernel, launch
from .mla_decode import (
    LOG2_E,
    R1_CONTEXT,
    R1_HEADS,
    R1_PAGE,
    SPLIT_KEYS,
    attend_split,
    format_constants,
    kernel_arguments,
    load_keys,
    load_queries,
    merge,
    quotient,
)

if TYPE_CHECKING:
    import triton.language as tl

PREFILL = Config(
    num_warps=8,
    num_stages=2,
    tiles={"QUERIES": 2, "HEADS": 16, "KEYS": 32},
    fp_fusion=False,
    source="this split's totals and those of the splits before take 128 registers a thread: 32 rows have 2 to 22 spills, "
    "64 have hundreds (sm_80, sm_90), and 64 become HGMMA on sm_90; keys as in decode, or the bits would differ",
)
UNPACK = Config(num_warps=4, num_stages=1, tiles={"KEYS": 32}, fp_fusion=False, source="one page of 32; memory-bound")


@kernel
def _prefill(
    queries_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    table_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    output_ptr: tl.tensor,
    scale: tl.float32,
    heads: tl.int32,
    table_stride: tl.int32,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> None:
    ROWS: tl.constexpr = QUERIES * HEADS
    tile = tl.program_id(1)
    first_row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    position = tl.load(tiles_ptr + tile * 4 + 1)
    length = tl.load(tiles_ptr + tile * 4 + 2)
    sequence = tl.load(tiles_ptr + tile * 4 + 3)
    query = tl.arange(0, ROWS) // HEADS
    head = tl.program_id(0) * HEADS + tl.arange(0, ROWS) % HEADS
    here = (query < length) & (head < heads)
    query_latent, query_rope = load_queries(
        queries_ptr, (first_row + query) * heads + head, here, LATENT, ROPE, BLOCK_LATENT, BLOCK_ROPE
    )
    visible = tl.where(here, position + query, -1)
    stop = position + length
    total = tl.zeros([ROWS, BLOCK_LATENT], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, stop, SPLIT):
        next_total, next_mass, next_peak = attend_split(
            query_latent,
            query_rope,
            visible,
            first,
            tl.minimum(first + SPLIT, stop),
            table_ptr + sequence.to(tl.int64) * table_stride,
            latent_ptr,
            scale_ptr,
            rope_ptr,
            scale,
            LATENT,
            ROPE,
            LATENT_ROW,
            SCALE_ROW,
            ROPE_ROW,
            SCALE_AT,
            ROPE_AT,
            FP8,
            PAGE,
            ROWS,
            KEYS,
            BLOCK_LATENT,
            BLOCK_ROPE,
            BLOCK_GROUPS,
        )
        total, mass, peak = merge(total, mass, peak, next_total, next_mass, next_peak)
    # Again from the start: the addresses would take registers all the way through the loop.
    column = tl.arange(0, BLOCK_LATENT)
    row = (first_row + query) * heads + head
    at = output_ptr + row[:, None] * LATENT + column[None, :]
    result = quotient(total, mass).to(output_ptr.dtype.element_ty)
    tl.store(at, result, mask=here[:, None] & (column < LATENT)[None, :])


@kernel
def _unpack(
    latent_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    output_ptr: tl.tensor,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> None:
    chosen = tl.program_id(0)
    start = tl.program_id(1) * KEYS
    row = tl.arange(0, KEYS)
    inside = start + row < PAGE
    latent, rope = load_keys(
        latent_ptr,
        scale_ptr,
        rope_ptr,
        tl.load(chosen_ptr + chosen).to(tl.int64) * PAGE + start,
        row,
        inside,
        output_ptr.dtype.element_ty,
        LATENT,
        ROPE,
        LATENT_ROW,
        SCALE_ROW,
        ROPE_ROW,
        SCALE_AT,
        ROPE_AT,
        FP8,
        KEYS,
        BLOCK_LATENT,
        BLOCK_ROPE,
        BLOCK_GROUPS,
    )
    column = tl.arange(0, BLOCK_LATENT)[None, :]
    turned = tl.arange(0, BLOCK_ROPE)[None, :]
    at = output_ptr + (chosen.to(tl.int64) * PAGE + start) * (LATENT + ROPE) + (row * (LATENT + ROPE))[:, None]
    tl.store(at + column, latent, mask=inside[:, None] & (column < LATENT))
    tl.store(at + LATENT + turned, rope, mask=inside[:, None] & (turned < ROPE))


def unpack(pages: torch.Tensor, chosen: torch.Tensor, form: KvFormat, dtype: torch.dtype) -> torch.Tensor:
    """Pages `chosen` (int32 [N]) of FP8 pages [P, page_size, row] as plain ones [N, page_size, kv_lora + rope]."""
    page_size = pages.shape[1]
    output = torch.empty((chosen.shape[0], page_size, form.kv_lora + form.rope), dtype=dtype, device=pages.device)
    launch(
        _unpack,
        (chosen.shape[0], -(-page_size // UNPACK.tiles["KEYS"])),
        *form.views(pages),
        chosen,
        output,
        config=UNPACK,
        PAGE=page_size,
        **format_constants(form, architecture(pages.device)),
    )
    return output


def prefill(
    queries: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    form: KvFormat,
    split_keys: int,
    softmax_scale: float,
) -> None:
    """Causal attention of tiles of queries, into their rows of `output`.

    Args:
        queries, table, output, split_keys, softmax_scale: as for `mla_decode.decode`.
        pages: [P, page_size, kv_lora + rope], contiguous, plain.
        form: of the pages.
        tiles: int32 [B, 4]: row of the first query, its position, number of queries (at most the configuration's), sequence.
    """
    heads = queries.shape[1]
    launch(
        _prefill,
        (-(-heads // PREFILL.tiles["HEADS"]), tiles.shape[0]),
        queries,
        *form.views(pages),
        table,
        tiles,
        output,
        softmax_scale * LOG2_E,
        heads,
        table.stride(0),
        config=PREFILL,
        PAGE=pages.shape[1],
        SPLIT=split_keys,
        **format_constants(form, architecture(queries.device)),
    )


def cases(architecture: int) -> Iterator[Case]:
    """All 128 heads of a prompt from its start, and the unpacking of 4096 keys for it."""
    plain, packed = KvFormat(512, 64, torch.bfloat16), KvFormat(512, 64, torch.uint8)

    def work(tokens: int) -> Work:
        pairs = tokens * (tokens + 1) / 2
        return Work(
            bytes=tokens * (plain.row_bytes + 2 * R1_HEADS * (576 + 512)),
            flops=2.0 * R1_HEADS * pairs * (576 + 512),
            programs=-(-tokens // PREFILL.tiles["QUERIES"]) * R1_HEADS / PREFILL.tiles["HEADS"],
            iterations=max(1.0, tokens / 2 / PREFILL.tiles["KEYS"]),
        )

    numbers = {"scale": "fp32", "heads": "i32", "table_stride": "i32"}
    yield Case(
        name="mla_prefill",
        kernel=_prefill,
        architecture=architecture,
        arguments={**kernel_arguments(plain), "output_ptr": "*bf16", **numbers},
        constants={"PAGE": R1_PAGE, "SPLIT": SPLIT_KEYS, **format_constants(plain, architecture)},
        config=PREFILL,
        tensor_core="HMMA",
        max_loop_instructions=740,
        may_spill=True,  # 2 to 22 instructions, by architecture
        arithmetic="fp16",
        work=work,
    )
    views = {"latent_ptr": "*u8", "scale_ptr": "*fp32", "rope_ptr": "*bf16"}
    yield Case(
        name="mla_unpack fp8 pages",
        kernel=_unpack,
        architecture=architecture,
        arguments={**views, "chosen_ptr": "*i32", "output_ptr": "*bf16"},
        constants={"PAGE": R1_PAGE, **format_constants(packed, architecture)},
        config=UNPACK,
        max_loop_instructions=1000,
        work=lambda _: Work(
            bytes=R1_CONTEXT * (packed.row_bytes + plain.row_bytes),
            flops=R1_CONTEXT * 512.0,
            programs=R1_CONTEXT / R1_PAGE,
            iterations=1,
        ),
    )
