"""How many rows the CPU paths multiply at a time, so that every row has the same bits in any batch.

BLAS libraries pick another inner loop for a matrix of one row, or of an odd number of rows, than for a tall one, and the
sums then differ in the last bit. Placement-invariance (the same answer for any number of expert hosts, any batch, any
chunking of the prompt) needs rows that do not depend on their company, so the row count is rounded up to a multiple of
`ROW_TILE`, where the kernels used for fp32 and bf16 agree with each other. `tests/kernels/test_row_invariance.py` holds
this on the machine it runs on, for every shape class the model uses and for one and two threads.
"""

from __future__ import annotations

import torch
from torch.nn import functional

ROW_TILE = 8
"""Found by comparing bits over 1..40, 64, 100, 128, 500, 512 rows and 1-2 threads: multiples of 4 agree for fp32 (bf16
always does); 8 leaves one factor of two to kernels that work on more rows at once."""


def padded_rows(rows: int) -> int:
    """`rows` rounded up to a multiple of `ROW_TILE`."""
    return -(-rows // ROW_TILE) * ROW_TILE


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """Append zero rows to x [T, K] up to a multiple of `ROW_TILE`; x itself (made contiguous) when there is nothing to add."""
    missing = padded_rows(x.shape[0]) - x.shape[0]
    return functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
