"""Rows around the layers: of the embedding, and behind the norms. Each is one call: what torch would do in several operations
takes it a tenth of a millisecond in a step of one token, whose weights have pushed its code out of the caches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from .library import loaded


def rows_of(table: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """The rows of a contiguous table [N, W] with these numbers: [R, W].

    Raises:
        IndexError: a number is not 0 to N - 1.
    """
    assert table.is_contiguous(), table.stride()
    wanted = array("q", numbers)
    out = torch.empty((len(wanted), table.shape[1]), dtype=table.dtype)
    row_bytes = table.shape[1] * table.element_size()
    address, count = wanted.buffer_info()
    if loaded().rows(table.data_ptr(), table.shape[0], row_bytes, address, count, out.data_ptr()):
        raise IndexError(f"rows {min(numbers)} to {max(numbers)} of a table of {table.shape[0]}")
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`kernels.rms_norm.rms_norm` of x [R, H] in bf16, with the order of sums that the layers' norms have; row-invariant."""
    assert x.dtype == weight.dtype == torch.bfloat16, (x.dtype, weight.dtype)
    assert weight.shape == x.shape[1:], (weight.shape, x.shape)
    assert weight.is_contiguous(), weight.stride()
    x = x.contiguous()
    out = torch.empty_like(x)
    loaded().rms_norm(x.data_ptr(), x.shape[0], x.shape[1], weight.data_ptr(), eps, out.data_ptr())
    return out
