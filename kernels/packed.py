"""Weights as the CPU kernels read them: packed once, when they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE = 16
"""Rows of a matrix that lie together, so that one instruction multiplies all of them."""

GROUP = 4
"""Tiles that are read together, hence lie together: memory is fast where it is read from one address upwards."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [N, K] in tiles of 16 rows, four of which lie as one; see `kernels/cpu/native/moray_cpu.h` for the order.

    Attributes:
        tiles: [ceil(N / 16), 16 K] float8_e4m3fn, bfloat16 or float32; rows past the last one are zeros. A row of this tensor
            is as large as a tile, and holds parts of all tiles of its group.
        scale_inv: [ceil(N/128), ceil(K/128)] fp32 where the elements are float8_e4m3fn, else None.
        rows: N.
    """

    tiles: torch.Tensor
    scale_inv: torch.Tensor | None
    rows: int

    @property
    def columns(self) -> int:
        """K."""
        return self.tiles.shape[1] // TILE

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.tiles.nbytes + (0 if self.scale_inv is None else self.scale_inv.nbytes)


def packed_rows(rows: int) -> int:
    """Tiles of a matrix with so many rows."""
    return -(-rows // TILE)
