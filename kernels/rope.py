"""Rotary position embedding over interleaved pairs, with YaRN context extension.

DeepSeek rotates the pairs (x0, x1), (x2, x3), ...; each pair shares one frequency.
RoPE: Su et al., 2021 (arXiv:2104.09864). YaRN: Peng et al., 2023 (arXiv:2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .cases import Case, Work
from .launch import Config, kernel, launch, uses_triton

if TYPE_CHECKING:
    import triton.language as tl


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature correction; 1.0 for a context that was not extended."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    """Plain RoPE frequencies [dim / 2] in radians per position, fp32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def yarn_inverse_frequencies(
    dim: int, theta: float, *, factor: float, original_context: int, beta_fast: float, beta_slow: float
) -> torch.Tensor:
    """YaRN frequencies [dim / 2], fp32.

    Pairs that turn more than `beta_fast` times over the original context keep their frequency, those that turn less than
    `beta_slow` times are slowed by `factor`, and a linear ramp joins the two.
    """

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow)), dim - 1)
    width = float(high - low) if high > low else 0.001  # a ramp of no width would divide by zero
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    plain = inverse_frequencies(dim, theta)
    return plain / factor * slowed + plain * (1 - slowed)


def rotation_table(frequencies: torch.Tensor, positions: int, scale: float) -> torch.Tensor:
    """Cosines and sines [positions, dim / 2, 2] in fp32 of every position, times `scale`."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1) * scale


def apply_rope(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, dim] or [T, heads, dim] (any strides) by rotation [T, dim / 2, 2] fp32 (rows of `rotation_table`).

    Returns:
        x's shape and dtype, contiguous. The bits are the same on every path: each product is rounded to fp32.
    """
    if not uses_triton(x, rotation):
        return rope_reference(x, rotation)
    x = x if x.stride(-1) == 1 else x.contiguous()
    wide = x if x.dim() == 3 else x.unsqueeze(1)
    tokens, heads, dim = wide.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = _config(heads, dim)
    launch(
        _rope,
        (tokens, -(-heads // config.tiles["HEADS"])),
        wide,
        rotation.contiguous(),
        out,
        wide.stride(0),
        wide.stride(1),
        heads,
        config=config,
        PAIRS=dim // 2,
    )
    return out


def rope_reference(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`apply_rope` in plain torch, for x [T, ..., dim]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (rotation.shape[1],)
    cos, sin = rotation[..., 0].reshape(shape), rotation[..., 1].reshape(shape)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


@kernel
def _rope(
    x_ptr: tl.tensor,
    rotation_ptr: tl.tensor,
    out_ptr: tl.tensor,
    token_stride: tl.int64,
    head_stride: tl.int64,
    heads: tl.int32,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, 2 * BLOCK_PAIRS)
    pair = tl.arange(0, BLOCK_PAIRS)
    inside = (head < heads)[:, None] & (column < 2 * PAIRS)[None, :]
    x = tl.load(x_ptr + token * token_stride + (head * head_stride)[:, None] + column, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, BLOCK_PAIRS, 2)))
    cos = tl.load(rotation_ptr + (token * PAIRS + pair) * 2, mask=pair < PAIRS, other=0.0)[None, :]
    sin = tl.load(rotation_ptr + (token * PAIRS + pair) * 2 + 1, mask=pair < PAIRS, other=0.0)[None, :]
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    out = tl.reshape(turned, (HEADS, 2 * BLOCK_PAIRS)).to(x.dtype)
    tl.store(out_ptr + ((token * heads + head) * (2 * PAIRS))[:, None] + column, out, mask=inside)


def _config(heads: int, dim: int) -> Config:
    # Rows of 64 bfloat16 are one 16-byte load for each of 8 threads: 16 rows are one for each of 4 warps.
    block = max(16, 1 << (dim // 2 - 1).bit_length())
    tiles = {"HEADS": min(16, 1 << (heads - 1).bit_length()), "BLOCK_PAIRS": block}
    return Config(num_warps=4, num_stages=1, tiles=tiles, fp_fusion=False, source="one 16-byte load a thread")


def cases(architecture: int) -> Iterator[Case]:
    """The queries of all 128 heads, a slice of each head's 192 columns."""
    yield Case(
        name="rope 128x64",
        kernel=_rope,
        architecture=architecture,
        arguments={
            "x_ptr": "*bf16",
            "rotation_ptr": "*fp32",
            "out_ptr": "*bf16",
            "token_stride": "i64",
            "head_stride": "i64",
            "heads": "i32",
        },
        constants={"PAIRS": 32},
        config=_config(128, 64),
        max_loop_instructions=160,
        work=lambda tokens: Work(tokens * (2 * 2 * 128 * 64 + 256), 6.0 * tokens * 128 * 32, tokens * 8, 1),
    )
