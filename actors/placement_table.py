"""The placement table: which host holds which expert in which slot. Plain data; only the controller makes new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EMPTY = -1
"""In place of an expert: the slot holds nothing. Only planned tables have such slots."""

COLD_HOST = "cold-host-"
"""How the ids of cold hosts begin: an id tells everybody what kind of host it is, also after its process was replaced, or
the controller."""


def is_cold(host_id: str) -> bool:
    """Whether the host is one of the cold tier: on a CPU, for experts that least is asked of (`experts.cold`)."""
    return host_id.startswith(COLD_HOST)


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """One epoch of the placement.

    Attributes:
        epoch: grows by one with every table.
        first_layer: index of the first layer with routed experts.
        experts: routed experts a layer.
        slots: host id -> for each layer from `first_layer` on, the logical expert in each of its slots, or
            `EMPTY`.
    """

    epoch: int
    first_layer: int
    experts: int
    slots: Mapping[str, tuple[tuple[int, ...], ...]]

    @property
    def layers(self) -> int:
        """Layers with routed experts."""
        return max((len(layers) for layers in self.slots.values()), default=0)

    def replicas(self, layer: int, expert: int) -> list[tuple[str, int]]:
        """(host, slot) of every replica of `expert` in model layer `layer`, in host order."""
        return [
            (host, slot)
            for host, layers in self.slots.items()
            for slot, held in enumerate(layers[layer - self.first_layer])
            if held == expert
        ]

    def missing(self, reachable: set[str]) -> list[tuple[int, int]]:
        """(layer, expert) pairs with no replica on any of the `reachable` hosts."""
        missing = []
        for index in range(self.layers):
            held = {e for host, layers in self.slots.items() if host in reachable for e in layers[index]}
            missing += [(self.first_layer + index, e) for e in range(self.experts) if e not in held]
        return missing

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dictionaries, for JSON and messages."""
        return {
            "epoch": self.epoch,
            "first_layer": self.first_layer,
            "experts": self.experts,
            "slots": {host: [list(layer) for layer in layers] for host, layers in self.slots.items()},
        }
