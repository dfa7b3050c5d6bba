"""The exact combine over rows that may lie anywhere, such as in the shared memory of a link."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .library import NativeLibrary


def combine_rows(
    library: NativeLibrary,
    parts: Sequence[tuple[npt.NDArray[np.int64], torch.Tensor]],
    topk_weights: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """`kernels.combine.combine_parts` of outputs in bf16 in this machine's memory: the same bits, and nothing is copied."""
    tokens, top_k = topk_weights.shape
    addresses = np.zeros(tokens * top_k, dtype=np.uintp)
    for pairs, rows in parts:
        assert rows.is_contiguous(), rows.stride()
        addresses[pairs] = np.arange(len(pairs), dtype=np.uintp) * np.uintp(2 * width) + np.uintp(rows.data_ptr())
    assert addresses.all(), "every pair has an output"
    out = torch.empty((tokens, width), dtype=torch.float32)
    library.combine(addresses.ctypes.data, topk_weights.data_ptr(), tokens, top_k, width, out.data_ptr())
    return out
