"""FP8 weights: e4m3 codes with one fp32 scale for every 128x128 block, as DeepSeek publishes them.

A weight `[out, in]` has `scale_inv` `[ceil(out/128), ceil(in/128)]`; the value of an element is its code times the
scale of its block. Blocks at the right and lower edge may be ragged. These functions are the plain torch reference on
every device; nothing here is tuned beyond what loading a checkpoint needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .packed import PackedWeight

BLOCK = 128
"""Rows and columns of a weight block that shares one scale."""

E4M3_MAX = 448.0
"""Largest finite value of float8_e4m3fn."""

SMALLEST_AMAX = 1e-12
"""Stands in for the largest value of an all-zero block, so that its scale is a positive, normal number."""

_ROWS_AT_A_TIME = 8 * BLOCK
"""Rows decoded together: bounds the temporaries of a [4096, 7168] decode to a few tens of MB."""


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A weight kept as it is stored.

    Attributes:
        codes: [N, K] float8_e4m3fn, contiguous; never NaN (loading refuses that).
        scale_inv: [ceil(N/128), ceil(K/128)] fp32, on the same device.
    """

    codes: torch.Tensor
    scale_inv: torch.Tensor

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.float8_e4m3fn, self.codes.dtype
        assert self.scale_inv.shape == scale_shape(*self.codes.shape), (self.codes.shape, self.scale_inv.shape)

    def to(self, device: torch.device) -> BlockWeight:
        """The same weight on `device`."""
        return BlockWeight(self.codes.to(device), self.scale_inv.to(device))


StoredWeight = torch.Tensor | BlockWeight
"""A matrix [N, K] whose rows lie one after the other."""

Weight = StoredWeight | PackedWeight
"""A matrix [N, K] a linear layer multiplies with: in a compute dtype, in FP8 as stored, or packed for the CPU kernels."""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations in FP8, each row in groups of 128 columns that share a scale.

    Attributes:
        codes: [T, K] float8_e4m3fn, contiguous.
        scales: [T, ceil(K/128)] fp32; the value of an element is its code times the scale of its group.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of `scale_inv` for a weight of `rows` x `columns`, ragged edges included."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """The exact fp32 values of a float8_e4m3fn tensor of any shape; both NaN codes give NaN.

    torch's own cast takes 28 times as long on a CPU (one thread, 4M elements), a table lookup 6 times. An e4m3 code
    moved seven bits up is a float16 with the same mantissa and an exponent too small by 15 - 7 = 8; that holds for
    subnormals too. Only the NaN code 0x7F would become a number, so it is given float16's NaN exponent.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # sign-extended: the sign ends up in bit 15 and its copies in bit 14
    is_nan = ((bits & 0x7F) + 1) & 0x80  # 0x80 for 0x7F and 0xFF, else 0
    half = ((bits << 7) & ~0x4000) | (is_nan << 7)
    return half.view(torch.float16).to(torch.float32).mul_(256.0)


def dequantize_blocks(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Decode a block-quantised weight: multiplied in fp32, then rounded once to `dtype`.

    Args:
        weight: [out, in] float8_e4m3fn.
        scale_inv: [ceil(out/128), ceil(in/128)] fp32, on the same device.
        dtype: of the result.

    Returns:
        [out, in] in `dtype`, contiguous.
    """
    rows, columns = weight.shape
    assert weight.dtype == torch.float8_e4m3fn, weight.dtype
    assert scale_inv.dtype == torch.float32, scale_inv.dtype
    assert scale_inv.shape == scale_shape(rows, columns), (weight.shape, scale_inv.shape)
    decoded = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, rows)
        scales = scale_inv[start // BLOCK : -(-stop // BLOCK)]
        values = decode_e4m3(weight[start:stop])
        values.mul_(_spread(scales, stop - start, columns))
        decoded[start:stop] = values
    return decoded


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight by its 128x128 blocks: each block's largest magnitude becomes 448.

    Args:
        weight: [out, in], any floating dtype; finite.

    Returns:
        ([out, in] float8_e4m3fn, [ceil(out/128), ceil(in/128)] fp32 scale_inv). An all-zero block gets zero codes and a
        tiny positive scale.
    """
    rows, columns = weight.shape
    values = weight.to(torch.float32)
    row_blocks, column_blocks = scale_shape(rows, columns)
    padded = values.new_zeros(row_blocks * BLOCK, column_blocks * BLOCK)
    padded[:rows, :columns] = values
    amax = padded.view(row_blocks, BLOCK, column_blocks, BLOCK).abs().amax(dim=(1, 3))
    scale_inv = amax.clamp_min(SMALLEST_AMAX) / E4M3_MAX
    scaled = values / _spread(scale_inv, rows, columns)
    # Division may leave a block's largest element an ulp above 448; the cast still rounds that to 448 (NaN is from 464).
    return scaled.to(torch.float8_e4m3fn), scale_inv


def _spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Repeat block scales over their elements: [ceil(rows/128), ceil(columns/128)] -> [rows, columns]."""
    return scales.repeat_interleave(BLOCK, dim=0)[:rows].repeat_interleave(BLOCK, dim=1)[:, :columns]
