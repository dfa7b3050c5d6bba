"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467), alone and with the residual add before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .cases import Case, Work
from .launch import Config, kernel, launch, uses_triton

if TYPE_CHECKING:
    import triton.language as tl

_R1_HIDDEN, _R1_Q_LORA, _R1_KV_LORA = 7168, 1536, 512
_MAX_WIDTH = 16384


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x [..., H] by its root mean square in fp32, then scale by weight [H]; returns x's dtype.

    A row with a NaN or an infinity comes out as NaN where torch gives NaN, and disturbs no other row.
    """
    if not uses_triton(x, weight):
        return rms_norm_reference(x, weight, eps)
    return _launch(x, None, weight, eps)[1]


def add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to residual, both [..., H] of one dtype, and normalise the sum.

    Returns:
        the sum, rounded to its dtype, and `rms_norm` of what that rounding left.
    """
    if not uses_triton(residual, x, weight):
        total = residual + x
        return total, rms_norm_reference(total, weight, eps)
    return _launch(x, residual, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


@kernel
def _rms_norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    width: tl.int32,
    eps: tl.float32,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * width + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normalised = (wide * scale).to(x.dtype)
    out = weight.to(tl.float32) * normalised.to(tl.float32)  # as torch: each step rounded to x's dtype
    tl.store(out_ptr + row * width + column, out.to(x.dtype), mask=inside)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    if width > _MAX_WIDTH:
        raise ValueError(f"rows of {width} elements; the rms_norm kernel holds at most {_MAX_WIDTH}")
    rows = _rows(x)
    residual_rows = rows if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    launch(
        _rms_norm,
        (rows.shape[0],),
        rows,
        residual_rows,
        weight,
        total,
        out,
        rows.stride(0),
        residual_rows.stride(0),
        width,
        eps,
        ADD=residual is not None,
        config=_config(width),
    )
    return total, out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., H] as [R, H] with contiguous rows; copied only where its strides allow no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _config(width: int) -> Config:
    # The smallest power of two that holds a row, in registers: 16384 columns over 16 warps are 32 fp32 a thread.
    block = max(64, 1 << (width - 1).bit_length())
    warps = 1 if block <= 512 else 4 if block <= 2048 else 8 if block <= 8192 else 16
    return Config(
        num_warps=warps, num_stages=1, tiles={"BLOCK": block}, source="a row in registers, <= 32 fp32 a thread"
    )


def cases(architecture: int) -> Iterator[Case]:
    """DeepSeek-R1's norms: two over the hidden size with residual adds, one over each latent."""
    for width, adds in ((_R1_HIDDEN, True), (_R1_Q_LORA, False), (_R1_KV_LORA, False)):

        def work(tokens: int, width: int = width, adds: bool = adds) -> Work:
            moved = 2 * width * (4 if adds else 2)
            return Work(bytes=tokens * moved + 2 * width, flops=4.0 * tokens * width, programs=tokens, iterations=1)

        pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "out_ptr"), "*bf16")
        yield Case(
            name=f"{'add_' if adds else ''}rms_norm {width}",
            kernel=_rms_norm,
            architecture=architecture,
            arguments={**pointers, "x_stride": "i64", "residual_stride": "i64", "width": "i32", "eps": "fp32"},
            constants={"ADD": adds},
            config=_config(width),
            max_loop_instructions=500 if adds else 250,
            work=work,
        )
