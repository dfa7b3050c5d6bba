"""Writing the latent cache: the compressed key-value is normalised, the shared key rotated, and the row stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .cases import Case, Work
from .fp8 import E4M3_MAX, SMALLEST_AMAX
from .kv_pages import GROUP, KvFormat
from .launch import Config, kernel, launch, uses_triton
from .rms_norm import rms_norm_reference
from .rope import rope_reference

if TYPE_CHECKING:
    import triton.language as tl

_CONFIG = Config(
    num_warps=4,
    num_stages=1,
    fp_fusion=False,
    source="512 columns are 4 a thread; fusion off: torch rounds each product",
)


def write_latent(
    compressed: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotation: torch.Tensor,
    cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> None:
    """Store the rows of T tokens in one layer's cache.

    Args:
        compressed: [T, kv_lora + rope], what kv_a gives; rows may have a stride.
        norm_weight: [kv_lora], in compressed's dtype.
        eps: of the norm.
        rotation: [T, rope / 2, 2] fp32, rows of `rotation_table`.
        cache: [P, page_size, row], of compressed's dtype or FP8 (see `KvFormat`), contiguous.
        cache_rows: [T] int64, page * page_size + offset; tokens with a negative one are padding and not stored. No two
            tokens may have the same.

    Raises:
        ValueError: rows of the cache have a width or dtype that does not suit.
    """
    kv_lora = norm_weight.shape[0]
    form = KvFormat.of(cache, kv_lora=kv_lora, rope=compressed.shape[1] - kv_lora)
    if not form.is_fp8 and cache.dtype != compressed.dtype:
        raise ValueError(f"a cache in {cache.dtype}, rows in {compressed.dtype}")
    if not uses_triton(compressed, norm_weight, rotation, cache, cache_rows):
        write_latent_reference(compressed, norm_weight, eps, rotation, cache, cache_rows)
        return
    compressed = compressed if compressed.stride(1) == 1 else compressed.contiguous()
    launch(
        _write_latent,
        (compressed.shape[0],),
        compressed,
        norm_weight,
        rotation.contiguous(),
        *form.views(cache),
        cache_rows,
        compressed.stride(0),
        eps,
        config=_CONFIG,
        **_constants(form),
    )


def write_latent_reference(
    compressed: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotation: torch.Tensor,
    cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> None:
    """`write_latent` in plain torch."""
    kv_lora = norm_weight.shape[0]
    form = KvFormat.of(cache, kv_lora=kv_lora, rope=compressed.shape[1] - kv_lora)
    latent, rope = compressed.split([form.kv_lora, form.rope], dim=-1)
    rows = torch.cat((rms_norm_reference(latent, norm_weight, eps), rope_reference(rope, rotation)), dim=-1)
    stored = cache_rows >= 0
    cache.view(-1, form.row)[cache_rows[stored]] = form.encode(rows[stored])


@kernel
def _e4m3_bits(x: tl.tensor) -> tl.tensor:
    """fp32 of magnitude at most 448 (and an ulp) as the bits of e4m3, to nearest even; NaN stays NaN. uint8.

    In integers, because GPUs before sm_89 cannot convert.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Normal numbers: add half of the 20 bits that go, less one where the last bit that stays is even; then move the bias
    # of the exponent from 127 to 7. A carry into the exponent is right.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the codes are multiples of 2^-9, to which adding 2^14 rounds an fp32.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(size < 0x3C800000, small, normal), 0x7E)
    return (sign | tl.where(size > 0x7F800000, 0x7F, code)).to(tl.uint8)


@kernel
def _write_latent(
    compressed_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rotation_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    stride: tl.int64,
    eps: tl.float32,
    LATENT: tl.constexpr,
    PAIRS: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    FP8: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token)
    if row >= 0:
        at = compressed_ptr + token * stride
        group = tl.arange(0, BLOCK_GROUPS)
        column = group[:, None] * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < LATENT
        x = tl.load(at + column, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / LATENT + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        # As torch: rounded after the norm, and after the weight.
        normed = (weight * (wide * scale).to(x.dtype).to(tl.float32)).to(x.dtype)

        pair = tl.arange(0, BLOCK_PAIRS)
        there = pair < PAIRS
        even = tl.load(at + LATENT + 2 * pair, mask=there, other=0.0).to(tl.float32)
        odd = tl.load(at + LATENT + 2 * pair + 1, mask=there, other=0.0).to(tl.float32)
        cos = tl.load(rotation_ptr + (token * PAIRS + pair) * 2, mask=there, other=0.0)
        sin = tl.load(rotation_ptr + (token * PAIRS + pair) * 2 + 1, mask=there, other=0.0)
        rope_at = rope_ptr + row * ROPE_ROW + ROPE_AT + 2 * pair
        kind = rope_ptr.dtype.element_ty
        tl.store(rope_at, (even * cos - odd * sin).to(x.dtype).to(kind), mask=there)
        tl.store(rope_at + 1, (even * sin + odd * cos).to(x.dtype).to(kind), mask=there)

        latent_at = latent_ptr + row * LATENT_ROW + column
        if FP8:
            values = normed.to(tl.float32)
            amax = tl.max(tl.abs(values), axis=1)
            # NaN where the group has a NaN or an infinity, which a maximum may pass over; else zero.
            poison = tl.sum(values * 0.0, axis=1)
            scales = tl.div_rn(tl.maximum(amax, SMALLEST_AMAX), tl.full([BLOCK_GROUPS], E4M3_MAX, tl.float32))
            spread = tl.broadcast_to(scales[:, None], (BLOCK_GROUPS, BLOCK_COLUMNS))
            tl.store(latent_at, _e4m3_bits(tl.div_rn(values, spread)), mask=inside)
            scale_at = scale_ptr + row * SCALE_ROW + SCALE_AT + group
            tl.store(scale_at, scales + poison, mask=group * BLOCK_COLUMNS < LATENT)
        else:
            tl.store(latent_at, normed, mask=inside)


def _constants(form: KvFormat) -> dict[str, Any]:
    block = max(GROUP, 1 << (form.kv_lora - 1).bit_length())
    return {
        "LATENT": form.kv_lora,
        "PAIRS": form.rope // 2,
        **form.constants(),
        "FP8": form.is_fp8,
        "E4M3_MAX": E4M3_MAX,
        "SMALLEST_AMAX": SMALLEST_AMAX,
        "BLOCK_GROUPS": block // GROUP,
        "BLOCK_COLUMNS": GROUP,
        "BLOCK_PAIRS": max(16, 1 << (form.rope // 2 - 1).bit_length()),
    }


def cases(architecture: int) -> Iterator[Case]:
    """Into FP8 pages, which is the longer of the two."""
    form = KvFormat(512, 64, torch.uint8)
    yield Case(
        name="write_latent fp8 pages",
        kernel=_write_latent,
        architecture=architecture,
        arguments={
            "compressed_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "rotation_ptr": "*fp32",
            "latent_ptr": "*u8",
            "scale_ptr": "*fp32",
            "rope_ptr": "*bf16",
            "rows_ptr": "*i64",
            "stride": "i64",
            "eps": "fp32",
        },
        constants=_constants(form),
        config=_CONFIG,
        max_loop_instructions=500,
        work=lambda tokens: Work(tokens * (2 * 576 + 256 + form.row_bytes), 8.0 * tokens * 576, tokens, 1),
    )
