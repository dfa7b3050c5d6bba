"""The activation inside a SwiGLU MLP (Shazeer, 2020, arXiv:2002.05202), alone and with the quantisation after it.

Both round as separate operations would: silu(gate) to the inputs' dtype, then its product with up to that dtype again. The
fused kernel quantises what is left after these roundings, so fusing changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .block_gemm import FP8_ARCHITECTURE
from .cases import Case, Work
from .fp8 import BLOCK, QuantizedRows
from .launch import Config, architecture, kernel, launch, uses_triton
from .linear import silu
from .quantize import empty_rows, quantize_groups, quantize_rows_reference

if TYPE_CHECKING:
    import triton.language as tl

_GROUPS = 8  # groups of 128 columns of one program: 8 elements of gate and of up a thread, 2 programs a row of 2048


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate_up [T, 2N], gate in the first N columns (bf16, fp16 or fp32; any row stride).

    Returns:
        [T, N] in gate_up's dtype. NaN and infinities give what the formula gives.
    """
    if not uses_triton(gate_up):
        return silu_mul_reference(gate_up)
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    _launch(gate_up, out, None, power_of_two_scales=False)
    return out


def silu_mul_quantize(gate_up: torch.Tensor, *, power_of_two_scales: bool = False) -> QuantizedRows:
    """`quantize_rows(silu_mul(gate_up))` in one pass, the same bits: codes [T, N] for gate_up [T, 2N]."""
    if not uses_triton(gate_up):
        return quantize_rows_reference(silu_mul_reference(gate_up), power_of_two_scales=power_of_two_scales)
    quantized = empty_rows(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device)
    fp8 = architecture(gate_up.device) >= FP8_ARCHITECTURE
    codes = quantized.codes if fp8 else quantized.codes.view(torch.uint8)
    _launch(gate_up, codes, quantized.scales, power_of_two_scales=power_of_two_scales)
    return quantized


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


@kernel
def silu_product(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """silu(gate) * up of two tiles of one dtype, rounded to it twice."""
    wide = gate.to(tl.float32)
    activated = (wide * (1.0 / (1.0 + tl.exp(-wide)))).to(gate.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@kernel
def _silu_mul(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.int64,
    width: tl.int32,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + column, mask=inside, other=0.0)
    product = silu_product(gate, up)
    if QUANTIZE:
        codes, scale = quantize_groups(product.to(tl.float32), FP8, POWER_OF_TWO)
        groups = tl.cdiv(width, 128)
        tl.store(out_ptr + row * width + column, codes, mask=inside)
        tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
    else:
        tl.store(out_ptr + row * width + column, product, mask=inside)


def _launch(
    gate_up: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None, *, power_of_two_scales: bool
) -> None:
    if gate_up.stride(-1) != 1:
        gate_up = gate_up.contiguous()
    rows, width = out.shape
    assert gate_up.shape == (rows, 2 * width), gate_up.shape
    launch(
        _silu_mul,
        (rows, -(-width // (BLOCK * _GROUPS))),
        gate_up,
        out,
        out if scales is None else scales,
        gate_up.stride(0),
        width,
        QUANTIZE=scales is not None,
        FP8=out.dtype == torch.float8_e4m3fn,
        POWER_OF_TWO=power_of_two_scales,
        config=_CONFIG,
    )


_CONFIG = Config(
    num_warps=4,
    num_stages=1,
    tiles={"GROUPS": _GROUPS},
    source="16 threads, each 8 elements of gate and of up, share a group: its maximum stays within a warp",
)


def cases(architecture: int) -> Iterator[Case]:
    """The intermediate of one expert of DeepSeek-R1, a row for every token-expert pair of a host with all 256."""
    width = 2048

    def work(tokens: int) -> Work:
        pairs = 8 * tokens
        return Work(
            bytes=pairs * width * (2 * 2 + 1 + 4 / BLOCK),
            flops=10.0 * pairs * width,
            programs=pairs * width / (BLOCK * _GROUPS),
            iterations=1,
        )

    fp8 = architecture >= FP8_ARCHITECTURE
    yield Case(
        name=f"silu_mul_quantize {width}",
        kernel=_silu_mul,
        architecture=architecture,
        arguments={
            "x_ptr": "*bf16",
            "out_ptr": "*fp8e4nv" if fp8 else "*u8",
            "scale_ptr": "*fp32",
            "x_stride": "i64",
            "width": "i32",
        },
        constants={"QUANTIZE": True, "FP8": fp8, "POWER_OF_TWO": False},
        config=_CONFIG,
        max_loop_instructions=520 if fp8 else 650,
        work=work,
    )
