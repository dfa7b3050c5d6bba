"""What can be asked of a running cluster, and what comes of it: plain data between the command line and the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..actors.placement_table import PlacementTable


@dataclass(frozen=True, slots=True)
class Wanted:
    """A change that is asked for; what is not named stays as it is.

    Attributes:
        experts: expert hosts there should be, without those of the cold tier.
        cold: expert hosts of the cold tier there should be.
        routers: routers there should be.
        replicas: (model layer, expert) -> copies it should have at least, from now on; 0 forgets what was asked before.
        drain: expert hosts to be emptied and ended.
        rebalance: plan for the load that was measured, also where nothing else changes.
    """

    experts: int | None = None
    routers: int | None = None
    replicas: Mapping[tuple[int, int], int] = field(default_factory=dict)
    drain: tuple[str, ...] = ()
    rebalance: bool = False
    cold: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """From one state of the cluster to the next.

    Attributes:
        epoch: of the new table; the present one's where the placement stays.
        added, removed: processes: expert hosts and routers.
        moved: (layer, expert) pairs that a host gets which did not hold them before.
        total: (layer, expert) pairs in all.
        balance_before, balance_after: see `load_monitor.balance`, under the load that was measured (equal loads where none
            was).
        cold_share_before, cold_share_after: share of that load for experts that cold hosts alone hold.
        shortages: what was asked for and could not be given, in words.
        seconds: how long it took; 0 for a plan.
    """

    epoch: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    moved: int = 0
    total: int = 0
    balance_before: float = 1.0
    balance_after: float = 1.0
    cold_share_before: float = 0.0
    cold_share_after: float = 0.0
    shortages: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"added {', '.join(self.added)}"] if self.added else []
        parts += [f"removed {', '.join(self.removed)}"] if self.removed else []
        return "; ".join([*parts, f"moved {self.moved} of {self.total} experts"])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.added or self.removed or self.moved)


def moved_experts(old: PlacementTable, new: PlacementTable) -> int:
    """(layer, expert) pairs that a host has in `new` and had not in `old`."""
    moved = 0
    for host, layers in new.slots.items():
        before = old.slots.get(host, ((),) * new.layers)
        moved += sum(len(set(now) - set(held)) for now, held in zip(layers, before, strict=True))
    return moved
