"""Packed matrices: made from what a checkpoint stores, described to the library, multiplied with rows of activations."""

from __future__ import annotations

import ctypes

import torch

from ..fp8 import BlockWeight, StoredWeight, dequantize_blocks
from ..packed import GROUP, TILE, PackedWeight, packed_rows
from .library import Matrix, loaded
from .memory import weight_memory

_KIND = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}

COLUMNS = 4
"""Columns come in multiples of this: what an instruction takes of e4m3 at once."""


def pack(weight: StoredWeight) -> PackedWeight:
    """Pack a matrix [N, K] in bf16 or fp32, or FP8 as stored; scales are kept, not copied.

    Raises:
        ValueError: K is no multiple of 4, or elements are of another type.
    """
    elements, scales = (weight.codes, weight.scale_inv) if isinstance(weight, BlockWeight) else (weight, None)
    rows, columns = elements.shape
    if elements.dtype not in _KIND or (elements.dtype == torch.float8_e4m3fn) != (scales is not None):
        raise ValueError(f"a matrix in {elements.dtype}: the CPU kernels take FP8 with scales, bfloat16 and float32")
    if columns % COLUMNS:
        raise ValueError(f"a matrix of {columns} columns: the CPU kernels take multiples of {COLUMNS}")
    if elements.is_meta:  # `moray plan` counts bytes
        return PackedWeight(elements.new_empty((packed_rows(rows), TILE * columns), dtype=elements.dtype), scales, rows)
    source = elements if elements.stride(1) == 1 else elements.contiguous()
    tiles = weight_memory.empty((packed_rows(rows), TILE * columns), elements.dtype)
    loaded().pack(source.data_ptr(), source.stride(0), rows, columns, _KIND[elements.dtype], tiles.data_ptr())
    return PackedWeight(tiles, scales, rows)


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The matrix [N, K] in fp32, by the definition of the order rather than by the library: for tests and references."""
    size, columns = weight.tiles.dtype.itemsize, weight.columns
    groups = weight.tiles.view(torch.uint8).split(GROUP)
    # Within a group: the first 64 bytes of each tile, the next ones of each, and so on.
    data = torch.cat([group.reshape(-1, len(group), TILE, 4).transpose(0, 1) for group in groups])
    if size == 1:
        # Within 64 bytes: four rows' columns 0 and 1, then the same rows' columns 2 and 3.
        data = data.reshape(-1, columns // 4, 4, 2, 4, 2).transpose(3, 4).reshape(-1, columns // 4, TILE, 4)
    elements = data.transpose(1, 2).contiguous().view(weight.tiles.dtype).reshape(-1, columns)[: weight.rows]
    if weight.scale_inv is not None:
        return dequantize_blocks(elements, weight.scale_inv)
    return elements.float()


def described(weight: PackedWeight) -> Matrix:
    """The matrix for the library; valid as long as `weight` lives."""
    scales = None if weight.scale_inv is None else weight.scale_inv.data_ptr()
    return Matrix(weight.tiles.data_ptr(), scales, weight.rows, weight.columns, _KIND[weight.tiles.dtype], 0)


def linear(x: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """x [T, K] in bf16 times a packed weight transposed: [T, N] in `dtype`, bf16 or fp32; row-invariant.

    Products are exact and summed in fp32; an FP8 weight's are multiplied with its scale block by block.
    """
    assert x.dtype == torch.bfloat16, x.dtype
    assert x.shape[1] == weight.columns, (x.shape, weight.columns)
    x = x.contiguous()
    out = torch.empty((x.shape[0], weight.rows), dtype=dtype)
    matrix = described(weight)  # which must outlive the call
    loaded().linear(x.data_ptr(), x.shape[0], ctypes.addressof(matrix), out.data_ptr(), dtype == torch.float32)
    return out
