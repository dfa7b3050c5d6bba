"""What a router's dispatch counts, whichever of its parts does the work."""

from __future__ import annotations

import numpy as np

from .placement_table import PlacementTable
from .routes import IntArray


class DispatchCounts:
    """Numbers that only grow. The router's thread counts; any may read.

    Args:
        table: of the model.

    Attributes:
        expert_tokens: [L, E] tokens routed to each expert, counted once however often they were sent. Each number is whole,
            though a step may be counted in some layers only.
        first_layer: the model layer that its first row is of.
        sequence: number of the last frame that asked a host for something.
        wait_s: time spent waiting for replies, in seconds.
        resent_shares, hedged_shares, fenced_hosts: see `RouterStats`.
    """

    def __init__(self, table: PlacementTable) -> None:
        self.expert_tokens: IntArray = np.zeros((table.layers, table.experts), dtype=np.int64)
        self.first_layer = table.first_layer
        self._address, self._row_bytes = self.expert_tokens.ctypes.data, self.expert_tokens.strides[0]
        self.sequence = 0
        self.wait_s = 0.0
        self.resent_shares = self.hedged_shares = self.fenced_hosts = 0

    def address(self, layer: int) -> int:
        """Of a model layer's row of `expert_tokens`, for native code to count in."""
        return self._address + (layer - self.first_layer) * self._row_bytes
