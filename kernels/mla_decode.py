"""Triton kernels of absorbed latent attention: one split of the keys, its merge with the splits before it, and decode.

Decode with split keys (Dao et al., "Flash-Decoding for long-context inference", 2023): each program takes one query, 16 of
its heads and one split of its keys, and `_merge_splits` adds the splits up. Inside a split the softmax is the online one
(Milakov and Gimelshein, 2018, arXiv:1805.02867). A cached row is read once: its first columns are also its value.

Why a query has the same bits decoded and prefilled (`mla_prefill.py`), alone and in company:

* splits are of equal length and tiles of keys start at multiples of the tile, wherever the query stands and whoever is
  beside it; `attend_split` and `merge` are shared, and merge in the order of the keys;
* the products are warp-level ones (HMMA: Hopper and Blackwell have other instructions from 64 rows on, so a program has 32 at
  most), in which a row's sums run over the same columns in the same order however many rows there are. That is how Triton
  lays such products out, not a promise of the instruction set: the tests of the machine code hold HMMA, the interpreter
  can hold only what does not depend on layouts and fusion, and the bits of a GPU are for the same tests to show on one;
* the softmax's denominator is such a product too, with a matrix of ones: a reduction over the tile would add in an order
  that depends on how the tile is spread over warps. A maximum has no order;
* a * b + c is never contracted to one rounding: a compiler might do so in one kernel and not in the other.

A tile of keys that a row may not see changes nothing in that row: it multiplies by exp2(0) = 1 and adds zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .cases import Case, Work
from .kv_pages import GROUP, KvFormat
from .launch import Config, architecture, kernel, launch

if TYPE_CHECKING:
    import triton.language as tl

LOG2_E = 1.4426950408889634
"""Scores are scaled by it too: the kernels exponentiate with base 2."""

_R1 = KvFormat(512, 64, torch.bfloat16)
_R1_FP8 = KvFormat(512, 64, torch.uint8)
R1_HEADS, R1_PAGE, R1_CONTEXT = 128, 32, 4096

SPLIT_KEYS = 1024
"""Keys that one program of decode goes through. A constant of the arithmetic: it decides in which order a sum over keys is
taken, so it must be the same wherever answers are to be the same. Fewer keys would give a lone sequence more programs, and
write more: a split costs 2056 bytes a head, to the 1152 that a key costs for all heads together."""

DECODE = Config(
    num_warps=4,
    num_stages=2,
    tiles={"HEADS": 16, "KEYS": 32},
    fp_fusion=False,
    source="no spills and 55 KiB of shared memory on all six architectures; 64 keys were tried on sm_80 and sm_90: no spills "
    "either, but 92 KiB, which leaves one program a multiprocessor where there are 99",
)
DECODE_FP8 = Config(
    num_warps=8,
    num_stages=2,
    tiles=DECODE.tiles,
    fp_fusion=False,
    source="as DECODE; with 4 warps a tile being decoded takes 128 registers a thread and spills on sm_80 and sm_120",
)
MERGE = Config(
    num_warps=4,
    num_stages=1,
    tiles={"HEADS": 2},
    fp_fusion=False,
    source="two rows of 512 fp32 are 8 numbers a thread; four rows spill on sm_100",
)


@kernel
def load_queries(
    queries_ptr: tl.tensor,
    row: tl.tensor,
    here: tl.tensor,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rows of [.., LATENT + ROPE] as two tiles padded with zeros; zeros where not `here`."""
    column = tl.arange(0, BLOCK_LATENT)
    turned = tl.arange(0, BLOCK_ROPE)
    at = queries_ptr + row * (LATENT + ROPE)
    latent = tl.load(at[:, None] + column[None, :], mask=here[:, None] & (column < LATENT)[None, :], other=0.0)
    rope = tl.load(at[:, None] + LATENT + turned[None, :], mask=here[:, None] & (turned < ROPE)[None, :], other=0.0)
    return latent, rope


@kernel
def load_keys(
    latent_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    dtype: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Cached rows first + row [KEYS] as latents and rotated keys, padded with zeros; zeros where not `inside`."""
    column = tl.arange(0, BLOCK_LATENT)
    turned = tl.arange(0, BLOCK_ROPE)
    latent_at = (latent_ptr + first * LATENT_ROW) + (row * LATENT_ROW)[:, None] + column[None, :]
    rope_at = (rope_ptr + first * ROPE_ROW + ROPE_AT) + (row * ROPE_ROW)[:, None] + turned[None, :]
    rope = tl.load(rope_at, mask=inside[:, None] & (turned < ROPE)[None, :], other=0.0).to(dtype)
    here = inside[:, None] & (column < LATENT)[None, :]
    if FP8 == "":
        latent = tl.load(latent_at, mask=here, other=0.0)
    else:
        codes = tl.load(latent_at, mask=here, other=0)
        group = tl.arange(0, BLOCK_GROUPS)[None, :]
        scale_at = (scale_ptr + first * SCALE_ROW + SCALE_AT) + (row * SCALE_ROW)[:, None] + group
        # Groups that do not exist (the latent is padded to a power of two) have zeros only.
        real = inside[:, None] & (group * (BLOCK_LATENT // BLOCK_GROUPS) < LATENT)
        scales = tl.load(scale_at, mask=real, other=0.0)
        if FP8 == "e4m3":
            values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:  # for GPUs without e4m3: its bits read as e4b15 are the value over 256, subnormals too
            values = codes.to(tl.float8e4b15, bitcast=True).to(tl.float16).to(tl.float32)
            scales *= 256.0
        spread = tl.broadcast_to(scales[:, :, None], (KEYS, BLOCK_GROUPS, BLOCK_LATENT // BLOCK_GROUPS))
        latent = (values * tl.reshape(spread, (KEYS, BLOCK_LATENT))).to(dtype)
    return latent, rope


@kernel
def attend_split(
    query_latent: tl.tensor,
    query_rope: tl.tensor,
    visible: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    table_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    scale: tl.float32,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to keys first .. stop - 1; row m sees those up to position visible[m].

    Returns:
        sums of weighted values [ROWS, BLOCK_LATENT], sums of weights [ROWS], and the largest scores [ROWS] (to base 2),
        which the weights are relative to: 0, 0 and -inf for a row that saw no key.
    """
    dtype: tl.constexpr = query_latent.dtype
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS, 16], tl.float32)
    total = tl.zeros([ROWS, BLOCK_LATENT], tl.float32)
    ones = tl.full([KEYS, 16], 1.0, tl.float32).to(dtype)
    for start in range(first, stop, KEYS):
        offset = tl.arange(0, KEYS)
        inside = start + offset < stop
        if PAGE % KEYS == 0:  # one page: one look into the table, and 32-bit offsets
            page_row = tl.load(table_ptr + start // PAGE).to(tl.int64) * PAGE + start % PAGE
            row = offset
        else:
            key = start + offset
            page_row = 0
            row = tl.load(table_ptr + key // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + key % PAGE
        latent, rope = load_keys(
            latent_ptr,
            scale_ptr,
            rope_ptr,
            page_row,
            row,
            inside,
            dtype,
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
        scores = tl.dot(query_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(query_rope, tl.trans(rope), scores, input_precision="ieee") * scale
        scores = tl.where((start + offset)[None, :] <= visible[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # inf - inf would be NaN
        fade = tl.exp2(peak - base)
        weight = tl.exp2(scores - base[:, None]).to(dtype)
        mass = tl.dot(weight, ones, mass * fade[:, None], input_precision="ieee")
        total = tl.dot(weight, latent, total * fade[:, None], input_precision="ieee")
        peak = new_peak
    return total, tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, mass, 0.0), axis=1), peak  # all 16 columns are equal


@kernel
def merge(
    total: tl.tensor,
    mass: tl.tensor,
    peak: tl.tensor,
    next_total: tl.tensor,
    next_mass: tl.tensor,
    next_peak: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What `attend_split` returned for some keys and for the split after them, as if for all of them. [R, C], [R], [R]."""
    new_peak = tl.maximum(peak, next_peak)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    fade, next_fade = tl.exp2(peak - base), tl.exp2(next_peak - base)
    total = total * fade[:, None] + next_total * next_fade[:, None]
    return total, mass * fade + next_mass * next_fade, new_peak


@kernel
def quotient(total: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """total / mass by rows; zeros for a row that saw no key."""
    return total / tl.where(mass == 0.0, 1.0, mass)[:, None]


@kernel
def _decode(
    queries_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    table_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    sums_ptr: tl.tensor,
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
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> None:
    tile, split = tl.program_id(1), tl.program_id(2)
    query_row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    position = tl.load(tiles_ptr + tile * 4 + 1)
    sequence = tl.load(tiles_ptr + tile * 4 + 3)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    here = head < heads
    query_latent, query_rope = load_queries(
        queries_ptr, query_row * heads + head, here, LATENT, ROPE, BLOCK_LATENT, BLOCK_ROPE
    )
    first = split * SPLIT
    total, mass, peak = attend_split(
        query_latent,
        query_rope,
        tl.full([HEADS], 0, tl.int32) + position,
        first,
        tl.minimum(first + SPLIT, position + 1),
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
        HEADS,
        KEYS,
        BLOCK_LATENT,
        BLOCK_ROPE,
        BLOCK_GROUPS,
    )
    row = (tile.to(tl.int64) * tl.num_programs(2) + split) * heads + head
    tl.store(sums_ptr + row * 2, mass, mask=here)
    tl.store(sums_ptr + row * 2 + 1, peak, mask=here)
    if first <= position:  # the total of an empty split is never read
        column = tl.arange(0, BLOCK_LATENT)
        at = totals_ptr + row[:, None] * LATENT + column[None, :]
        tl.store(at, total, mask=here[:, None] & (column < LATENT)[None, :])


@kernel
def _merge_splits(
    totals_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    output_ptr: tl.tensor,
    heads: tl.int32,
    splits: tl.int32,
    LATENT: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    query_row = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    position = tl.load(tiles_ptr + tile * 4 + 1)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    here = head < heads
    column = tl.arange(0, BLOCK_LATENT)
    inside = here[:, None] & (column < LATENT)[None, :]
    total = tl.zeros([HEADS, BLOCK_LATENT], tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    for split in range(tl.minimum(position // SPLIT + 1, splits)):  # the others are empty
        row = (tile.to(tl.int64) * splits + split) * heads + head
        next_mass = tl.load(sums_ptr + row * 2, mask=here, other=0.0)
        next_peak = tl.load(sums_ptr + row * 2 + 1, mask=here, other=float("-inf"))
        next_total = tl.load(totals_ptr + row[:, None] * LATENT + column[None, :], mask=inside, other=0.0)
        total, mass, peak = merge(total, mass, peak, next_total, next_mass, next_peak)
    at = output_ptr + (query_row * heads + head)[:, None] * LATENT + column[None, :]
    tl.store(at, quotient(total, mass).to(output_ptr.dtype.element_ty), mask=inside)


def format_constants(form: KvFormat, arch: int) -> dict[str, Any]:
    """Compile-time constants that describe the rows."""
    block_latent = max(16, 1 << (form.kv_lora - 1).bit_length())
    return {
        "LATENT": form.kv_lora,
        "ROPE": form.rope,
        **form.constants(),
        "FP8": ("e4m3" if arch >= 89 else "e4b15") if form.is_fp8 else "",
        "BLOCK_LATENT": block_latent,
        "BLOCK_ROPE": max(16, 1 << (form.rope - 1).bit_length()),
        "BLOCK_GROUPS": max(1, block_latent // GROUP),
    }


def decode(
    queries: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    output: torch.Tensor,
    *,
    form: KvFormat,
    split_keys: int,
    splits: int,
    softmax_scale: float,
) -> None:
    """Attention of single queries, into their rows of `output`.

    Args:
        queries: [T, heads, kv_lora + rope], contiguous.
        pages: [P, page_size, row], contiguous.
        table: int32 [S, W], contiguous, page of each `page_size` positions of each sequence.
        tiles: int32 [B, 4]: row of the query, its position, 1, its sequence (a row of the table).
        output: [T, heads, kv_lora].
        form: of the pages.
        split_keys: keys a split; a multiple of the tile.
        splits: at least as many as the longest sequence needs.
        softmax_scale: multiplies the scores.
    """
    heads, count = queries.shape[1], tiles.shape[0]
    device = queries.device
    totals = torch.empty((count, splits, heads, form.kv_lora), dtype=torch.float32, device=device)
    sums = torch.empty((count, splits, heads, 2), dtype=torch.float32, device=device)
    constants = format_constants(form, architecture(device))
    launch(
        _decode,
        (-(-heads // DECODE.tiles["HEADS"]), count, splits),
        queries,
        *form.views(pages),
        table,
        tiles,
        totals,
        sums,
        softmax_scale * LOG2_E,
        heads,
        table.stride(0),
        config=DECODE_FP8 if form.is_fp8 else DECODE,
        PAGE=pages.shape[1],
        SPLIT=split_keys,
        **constants,
    )
    launch(
        _merge_splits,
        (-(-heads // MERGE.tiles["HEADS"]), count),
        totals,
        sums,
        tiles,
        output,
        heads,
        splits,
        config=MERGE,
        LATENT=form.kv_lora,
        SPLIT=split_keys,
        BLOCK_LATENT=constants["BLOCK_LATENT"],
    )


def kernel_arguments(form: KvFormat) -> dict[str, str]:
    """Types of the pointers that decode and prefill begin with, for queries in bfloat16."""
    views = ("*u8", "*fp32", "*bf16") if form.is_fp8 else ("*bf16",) * 3
    names = ("latent_ptr", "scale_ptr", "rope_ptr")
    return {"queries_ptr": "*bf16", **dict(zip(names, views, strict=True)), "table_ptr": "*i32", "tiles_ptr": "*i32"}


def cases(architecture: int) -> Iterator[Case]:
    """All 128 heads, as attention runs on every router; each token has 4096 keys of its own."""
    splits = R1_CONTEXT // SPLIT_KEYS
    numbers = {"scale": "fp32", "heads": "i32", "table_stride": "i32"}
    for form in (_R1, _R1_FP8):

        def decode_work(tokens: int, form: KvFormat = form) -> Work:
            read = R1_CONTEXT * form.row_bytes + R1_HEADS * 2 * 576
            return Work(
                bytes=tokens * (read + splits * R1_HEADS * 4 * 514),
                flops=2.0 * tokens * R1_HEADS * R1_CONTEXT * (576 + 512),
                programs=tokens * splits * R1_HEADS / DECODE.tiles["HEADS"],
                iterations=SPLIT_KEYS / DECODE.tiles["KEYS"],
            )

        yield Case(
            name=f"mla_decode {'fp8' if form.is_fp8 else 'bf16'} pages",
            kernel=_decode,
            architecture=architecture,
            arguments={**kernel_arguments(form), "totals_ptr": "*fp32", "sums_ptr": "*fp32", **numbers},
            constants={"PAGE": R1_PAGE, "SPLIT": SPLIT_KEYS, **format_constants(form, architecture)},
            config=DECODE_FP8 if form.is_fp8 else DECODE,
            tensor_core="HMMA",
            max_loop_instructions=1200 if form.is_fp8 else 770,
            arithmetic="fp16",
            work=decode_work,
        )

    def merge_work(tokens: int) -> Work:
        moved = splits * 4 * 514 + 2 * 512
        return Work(
            tokens * R1_HEADS * moved,
            4.0 * tokens * R1_HEADS * splits * 512,
            tokens * R1_HEADS / MERGE.tiles["HEADS"],
            splits,
        )

    yield Case(
        name="mla_merge_splits",
        kernel=_merge_splits,
        architecture=architecture,
        arguments={
            **dict.fromkeys(("totals_ptr", "sums_ptr"), "*fp32"),
            "tiles_ptr": "*i32",
            "output_ptr": "*bf16",
            "heads": "i32",
            "splits": "i32",
        },
        constants={"LATENT": 512, "SPLIT": SPLIT_KEYS, "BLOCK_LATENT": 512},
        unaligned=frozenset({"splits"}),
        config=MERGE,
        max_loop_instructions=95,
        work=merge_work,
    )
