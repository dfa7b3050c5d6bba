"""FP8 e4m3 in 128x128 blocks, as in the published checkpoint: what the export stores and what training imitates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name everyone uses)

from .config import FP8_BLOCK

E4M3_MAX = 448.0


def block_scales(weight: Tensor) -> Tensor:
    """`weight_scale_inv` float32 [..., ceil(rows / 128), ceil(cols / 128)] of weight [..., rows, cols]."""
    rows, cols = weight.shape[-2:]
    padded = F.pad(weight.detach().float().abs(), (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    grid = (padded.shape[-2] // FP8_BLOCK, FP8_BLOCK, padded.shape[-1] // FP8_BLOCK, FP8_BLOCK)
    blocks = padded.reshape(*weight.shape[:-2], *grid)
    return torch.clamp(blocks.amax((-1, -3)), min=1e-12) / E4M3_MAX


def spread(scales: Tensor, rows: int, cols: int) -> Tensor:
    """Scales repeated to one per element, [..., rows, cols]."""
    return scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)[..., :rows, :cols]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn of the same shape, scales): weight is about value * scale."""
    scales = block_scales(weight)
    return (weight / spread(scales, *weight.shape[-2:])).to(torch.float8_e4m3fn), scales


def dequantize(value: Tensor, scales: Tensor) -> Tensor:
    """float32 weights."""
    return value.float() * spread(scales, *value.shape[-2:])


def round_e4m3(x: Tensor) -> Tensor:
    """Round float32 |x| <= 448 to e4m3: torch's own cast runs at 0.2 G elements a second on a CPU.

    The exponent bits of x alone are a power of two p; adding and subtracting 1.5 * 2^20 * p leaves three mantissa
    bits, rounded to even. Below 2^-6 the spacing stays 2^-9.
    """
    shift = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-6).mul_(1.5 * 2**20)
    return (x + shift).sub_(shift)


def fake_quantize(weight: Tensor) -> Tensor:
    """The weight as FP8 would have it, with the gradient passed straight through."""
    with torch.no_grad():
        scales = spread(block_scales(weight), *weight.shape[-2:])
        rounded = round_e4m3(weight / scales).mul_(scales)
    return weight + (rounded - weight).detach()


def quantize_activations(x: Tensor) -> Tensor:
    """x [..., channels] as GPUs see it: e4m3 with one scale per token and 128 channels, back in the dtype of x."""
    size = x.shape[-1]
    blocks = F.pad(x.float(), (0, -size % FP8_BLOCK)).reshape(*x.shape[:-1], -1, FP8_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., :size].to(x.dtype)
