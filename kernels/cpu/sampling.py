"""Choosing tokens on CPUs: what `kernels/sampling.py` defines, token for token."""

from __future__ import annotations

from array import array
from ctypes import c_int32

import torch

from .library import NativeLibrary


def choose(library: NativeLibrary, logits: torch.Tensor, table: array[int]) -> list[int]:
    """The chosen token of every row, -1 where a row's largest logit is not finite; the library's threads share the rows.

    Args:
        library: the kernels.
        logits: [B, V] fp32 on the CPU, V from 1 to `sampling_kernels.MAX_VOCABULARY`; copied unless a row lies together.
        table: B lines of `sampling_kernels.FIELDS`, 64-bit integers or the bits of an fp64, one after the other.
    """
    rows, width = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = (c_int32 * rows)()
    library.sample(logits.data_ptr(), logits.stride(0), rows, width, table.buffer_info()[0], tokens)
    return list(tokens)
