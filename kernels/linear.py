"""Linear layers and activations whose every row has the same bits in any batch.

Each kernel keeps that promise in its own way: `block_gemm`, `dense_gemm` and the native ones (`cpu/native/gemm.h`) by a fixed
loop over K, torch's CPU paths by the padding of `padding.py`. Multiplications on a GPU never go to a library that chooses its
algorithm by the shape.
"""

from __future__ import annotations

import torch

from .block_gemm import block_gemm
from .cpu import matrix
from .dense_gemm import dense_gemm, dense_gemm_by_head
from .fp8 import BlockWeight, Weight
from .packed import PackedWeight
from .padding import ROW_TILE as ROW_TILE  # these three for whoever pads rows of its own
from .padding import pad_rows as pad_rows
from .padding import padded_rows as padded_rows
from .quantize import quantize_rows


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, giving [T, N] in x's dtype; no row depends on T or on another row.

    With an FP8 weight as stored, x is quantised too (W8A8), on the CPU as on a GPU. With a packed one x is bf16 and stays so
    (W8A16): CPUs multiply bf16 faster than they quantise.
    """
    if isinstance(weight, PackedWeight):
        return matrix.linear(x, weight, x.dtype)
    if isinstance(weight, BlockWeight):
        return block_gemm(quantize_rows(x), weight, x.dtype)
    return dense_gemm(x, weight)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One matrix per head: x [T, heads, K] times weight [heads, K, N], giving [T, heads, N]; row-invariant like `linear`."""
    return dense_gemm_by_head(x, weight)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) in fp32.

    torch.sigmoid and torch's silu compute the elements that do not fill a last vector with other instructions, and those
    differ in the last bit; which elements these are depends on the size of the tensor and the number of threads.
    """
    return 1.0 / (1.0 + torch.exp(-x.float()))


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), computed in fp32, in x's dtype."""
    return (x.float() * sigmoid(x)).to(x.dtype)
