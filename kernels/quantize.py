"""Activations to FP8: every row in groups of 128 columns, each with the scale that makes its largest magnitude 448.

The scheme is that of DeepSeek-V3's training (arXiv:2412.19437, section 3.3.2) and of its published inference code. The codes
are a product, x * (1 / scale), in which each step is correctly rounded; so they, and the scales, are the same bits on every
GPU and on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .block_gemm import FP8_ARCHITECTURE
from .cases import Case, Work
from .fp8 import BLOCK, E4M3_MAX, SMALLEST_AMAX, QuantizedRows
from .launch import Config, architecture, kernel, launch, uses_triton

if TYPE_CHECKING:
    import triton.language as tl

_GROUPS = 8  # groups of one program: 8 elements a thread, and enough programs for one row of 7168


def quantize_rows(x: torch.Tensor, *, power_of_two_scales: bool = False) -> QuantizedRows:
    """Quantise x [T, K] (bf16, fp16 or fp32; any row stride) by groups of 128 columns, the last of which may be ragged.

    Args:
        x: what to quantise. A group that holds a NaN or an infinity gets a NaN scale and NaN codes, which makes NaN of
            everything that is computed from its row; other groups are not affected. A group of zeros gets zero codes and
            a tiny scale.
        power_of_two_scales: round each scale up to a power of two, as checkpoints with ue8m0 scales expect.

    Returns:
        codes [T, K] and scales [T, ceil(K / 128)].
    """
    if not uses_triton(x):
        return quantize_rows_reference(x, power_of_two_scales=power_of_two_scales)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, width = x.shape
    quantized = empty_rows(rows, width, x.device)
    fp8 = architecture(x.device) >= FP8_ARCHITECTURE
    launch(
        _quantize_rows,
        (rows, -(-quantized.scales.shape[1] // _GROUPS)),
        x,
        quantized.codes if fp8 else quantized.codes.view(torch.uint8),
        quantized.scales,
        x.stride(0),
        width,
        FP8=fp8,
        POWER_OF_TWO=power_of_two_scales,
        config=CONFIG,
    )
    return quantized


def empty_rows(rows: int, width: int, device: torch.device) -> QuantizedRows:
    """Memory for quantised rows, not filled."""
    return QuantizedRows(
        codes=torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device),
        scales=torch.empty(rows, -(-width // BLOCK), dtype=torch.float32, device=device),
    )


def quantize_rows_reference(x: torch.Tensor, *, power_of_two_scales: bool = False) -> QuantizedRows:
    """`quantize_rows` in plain torch."""
    rows, width = x.shape
    groups = -(-width // BLOCK)
    values = functional.pad(x.float(), (0, groups * BLOCK - width)).view(rows, groups, BLOCK)
    amax = values.abs().amax(dim=-1)
    scales = amax.clamp_min(SMALLEST_AMAX) / E4M3_MAX
    if power_of_two_scales:
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scales = scales.masked_fill(~amax.isfinite(), float("nan"))
    codes = (values * (1.0 / scales)[..., None]).to(torch.float8_e4m3fn)
    return QuantizedRows(
        codes.view(torch.uint8).view(rows, -1)[:, :width].contiguous().view(torch.float8_e4m3fn), scales
    )


@kernel
def quantize_groups(values: tl.tensor, FP8: tl.constexpr, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Quantise values [G, 128] in fp32: codes [G, 128] (e4m3, or its bits where not FP8) and scales [G]."""
    # As integers, magnitudes are in the order of the numbers, with infinity and NaN above all others; tl.max on floats would
    # pass over a NaN.
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = tl.maximum(amax.to(tl.float32, bitcast=True), 1e-12)
    scale = tl.div_rn(largest, 448.0)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(amax < 0x7F800000, scale, float("nan"))
    scaled = values * tl.div_rn(1.0, scale)[:, None]
    codes = scaled.to(tl.float8e4nv) if FP8 else e4m3_bits(scaled)
    return codes, scale


@kernel
def e4m3_bits(values: tl.tensor) -> tl.tensor:
    """The bytes of fp32 numbers of magnitude below 464 rounded to e4m3, to nearest even; NaN stays NaN."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Three mantissa bits stay; a carry runs into the exponent, as it should. The bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2**-6 the step is 2**-9, which is the last place of a number near 2**14: adding that rounds.
    near = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = near.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@kernel
def _quantize_rows(
    x_ptr: tl.tensor,
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.int64,
    width: tl.int32,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    values = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    codes, scale = quantize_groups(values, FP8, POWER_OF_TWO)
    groups = tl.cdiv(width, 128)
    tl.store(code_ptr + row * width + column, codes, mask=inside)
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)


CONFIG = Config(
    num_warps=4,
    num_stages=1,
    tiles={"GROUPS": _GROUPS},
    source="16 threads, each 8 elements (one 16-byte load of bf16), share a group: its maximum stays within a warp",
)


def cases(architecture: int) -> Iterator[Case]:
    """The hidden state of DeepSeek-R1, before every FP8 linear layer that reads it."""
    width = 7168

    def work(tokens: int) -> Work:
        return Work(
            bytes=tokens * width * (2 + 1 + 4 / BLOCK),
            flops=3.0 * tokens * width,
            programs=tokens * -(-width // (BLOCK * _GROUPS)),
            iterations=1,
        )

    fp8 = architecture >= FP8_ARCHITECTURE
    yield Case(
        name=f"quantize_rows {width}",
        kernel=_quantize_rows,
        architecture=architecture,
        arguments={
            "x_ptr": "*bf16",
            "code_ptr": "*fp8e4nv" if fp8 else "*u8",
            "scale_ptr": "*fp32",
            "x_stride": "i64",
            "width": "i32",
        },
        constants={"FP8": fp8, "POWER_OF_TWO": False},
        config=CONFIG,
        max_loop_instructions=340 if fp8 else 460,
        work=work,
    )
