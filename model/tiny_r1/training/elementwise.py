"""The elementwise parts of the network, which training compiles, and the two places where quantisation hooks in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name everyone uses)

Filter = Callable[[Tensor], Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE: channels (0, 1), (2, 3), ... of x [B, S, heads, rope] share a frequency.

    cos and sin: [B, S, 1, rope / 2].
    """
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Masked softmax attention, q and k [B, heads, S, D], mask bool [B, 1, S, S] (True: may look)."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    return scores.masked_fill(~mask, -1e30).softmax(-1).to(v.dtype) @ v


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@dataclass
class Kernels:
    """The elementwise parts, which training swaps for compiled ones."""

    rotate: Callable[..., Tensor] = rotate
    attend: Callable[..., Tensor] = attend
    swiglu: Callable[..., Tensor] = swiglu
    normalise: Callable[..., Tensor] = normalise
    weight_filter: Filter | None = None  # what the quantised matrices go through before each use
    activation_filter: Filter | None = None  # what goes into the quantised matrices goes through this

    def compile(self) -> None:
        """Fuse them with torch.compile (CPU: needs a C++ compiler)."""
        for name in ("rotate", "attend", "swiglu", "normalise"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))


KERNELS = Kernels()
