"""Rotary position embedding over interleaved pairs, with YaRN context extension.

DeepSeek rotates the pairs (x0, x1), (x2, x3), ...; each pair shares one frequency.
RoPE: Su et al., 2021 (arXiv:2104.09864). YaRN: Peng et al., 2023 (arXiv:2309.00071).
"""

from __future__ import annotations

import math

import torch


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
    """Rotate x [T, ..., dim] by rotation [T, dim / 2, 2] (rows of `rotation_table`); returns x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (rotation.shape[1],)
    cos, sin = rotation[..., 0].reshape(shape), rotation[..., 1].reshape(shape)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
