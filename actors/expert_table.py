"""What a host serves, as native code reads it: the packed experts of every layer of every placement epoch."""

from __future__ import annotations

from collections.abc import Mapping

from ..kernels.cpu.library import loaded
from ..kernels.experts import ExpertWeights
from .native_library import LayerExperts, Table


class ExpertTable:
    """The layers whose experts are packed; others are left to Python, and so are those that hold no expert.

    It never changes. It keeps the experts in memory for as long as anybody has it: who calls native code with it has it for as
    long as the call lasts, and `supersede` sees to it that this is not for long.

    Args:
        epochs: for each epoch, layer -> experts.
    """

    def __init__(self, epochs: Mapping[int, Mapping[int, ExpertWeights]]) -> None:
        packed = [
            (epoch, layer, experts.packed)
            for epoch, layers in sorted(epochs.items())
            for layer, experts in sorted(layers.items())
            if experts.packed is not None
        ]
        self._kept = [mlps for _, _, mlps in packed]
        self._layers = (LayerExperts * max(1, len(packed)))(
            *(LayerExperts(epoch, layer, mlps.hidden, mlps.num_slots, mlps.address) for epoch, layer, mlps in packed)
        )
        self.structure = Table(self._layers, len(packed), 0, loaded().grouped_mlp_address if packed else None)

    def __len__(self) -> int:
        return len(self._kept)

    def supersede(self) -> None:
        """Have calls that use this table end soon: another one has taken its place. For any thread."""
        self.structure.superseded = 1
