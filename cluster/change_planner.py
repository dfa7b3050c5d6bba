"""What a change would do to the cluster: plans for what is wanted, under the load that was measured. Changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..actors.placement_table import PlacementTable, is_cold
from ..configs.errors import ConfigError
from ..model.config import ModelConfig
from .assembly import cold_name, host_name, router_name
from .changes import Change, Wanted, moved_experts
from .cold_tier import cold_shares
from .load_monitor import LoadMonitor, balance
from .placement import plan_next
from .placement_plan import PlacementPlan
from .registry import Registry, by_kind, by_number

_ENOUGH_TOKENS = 100.0
"""Tokens an expert must have seen lately, on average, for a plan to heed their distribution without being told to."""


class ChangePlanner:
    """Plans from the table in force.

    Args:
        monitor: has the measured load.
    """

    def __init__(self, registry: Registry, config: ModelConfig, monitor: LoadMonitor) -> None:
        self._registry = registry
        self._config = config
        self._monitor = monitor

    def load(self) -> npt.NDArray[np.float64] | None:
        """The load to plan for: what was measured, or None where that is too little to go by."""
        enough = _ENOUGH_TOKENS * self._config.n_routed_experts * len(self._config.moe_layers)
        return self._monitor.load if self._monitor.tokens >= enough else None

    def plan(self, wanted: Wanted) -> tuple[Change, PlacementPlan]:
        """What a change would do, and the placement it would lead to.

        Raises:
            ConfigError: it cannot be.
        """
        registry = self._registry
        with registry.lock:
            table, routers = registry.table, by_number(registry.routers)
            replicas = merged(registry.replicas, wanted)
            nodes = {name: host.handle.node for name, host in registry.hosts.items() if host.handle is not None}
        if wanted.rebalance and self._monitor.tokens == 0:
            raise ConfigError("rebalance: no load was measured yet; send some requests first")
        load = self._monitor.load if wanted.rebalance else self.load()
        measured = np.ones((table.layers, table.experts)) if load is None else load
        experts = registry.deployment.experts
        hosts = _next_hosts(table, wanted)
        if registry.deployment.link == "nccl" and any(map(is_cold, hosts)):
            raise ConfigError("link = 'nccl': cold hosts have no GPU; use link: auto")
        plan = plan_next(
            self._config,
            hosts,
            min_replicas=experts.min_replicas,
            spare_slots=experts.spare_slots,
            cold_slots=experts.cold.slots,
            load=load,
            replicas=replicas,
            nodes={name: node for name, node in nodes.items() if name in hosts},
            current=table,
        )
        asked = wanted.rebalance or wanted.replicas or hosts != by_number(table.slots)
        changed = bool(asked and plan.changed)
        added, removed = _next_routers(routers, wanted.routers)
        change = Change(
            epoch=plan.table.epoch if changed else table.epoch,
            added=(*(host for host in hosts if host not in table.slots), *added),
            removed=(*(host for host in table.slots if host not in hosts), *removed),
            moved=moved_experts(table, plan.table) if changed else 0,
            total=table.layers * table.experts,
            balance_before=round(balance(measured, table), 4),
            balance_after=round(balance(measured, plan.table if changed else table), 4),
            cold_share_before=round(cold_shares(measured, table)[0], 4),
            cold_share_after=round(cold_shares(measured, plan.table if changed else table)[0], 4),
            shortages=_in_words(plan),
        )
        return change, plan


def merged(replicas: Mapping[tuple[int, int], int], wanted: Wanted) -> dict[tuple[int, int], int]:
    """The copies that are asked for, with what a change adds and forgets."""
    together = {**replicas, **wanted.replicas}
    return {pair: copies for pair, copies in together.items() if copies}


def _next_hosts(table: PlacementTable, wanted: Wanted) -> list[str]:
    """The hosts there will be: those that are drained leave, then those with the highest numbers of their kind.

    Raises:
        ConfigError: there is no such host to drain, or nothing would be left.
    """
    unknown = [name for name in wanted.drain if name not in table.slots]
    if unknown:
        raise ConfigError(
            f"drain {', '.join(unknown)}: no such expert host; there are {', '.join(by_number(table.slots))}"
        )
    stay, cold = by_kind(name for name in table.slots if name not in wanted.drain)
    count = len(stay) if wanted.experts is None else wanted.experts
    if count < 1:
        raise ConfigError(f"{count} expert hosts: at least one that is not cold must hold experts")
    cold_count = len(cold) if wanted.cold is None else wanted.cold
    return [*_as_many(stay, count, host_name, table), *_as_many(cold, cold_count, cold_name, table)]


def _as_many(stay: list[str], count: int, name_of: Callable[[int], str], table: PlacementTable) -> list[str]:
    """The first `count` hosts of one kind, and as many new ones as are missing."""
    unused = (name for index in itertools.count() if (name := name_of(index)) not in table.slots)
    return by_number([*stay[:count], *itertools.islice(unused, max(0, count - len(stay)))])


def _next_routers(routers: list[str], count: int | None) -> tuple[list[str], list[str]]:
    """Routers to add and to remove.

    Raises:
        ConfigError: none would be left.
    """
    if count is None:
        return [], []
    if count < 1:
        raise ConfigError(f"{count} routers: at least one must take the requests")
    unused = (name for index in itertools.count() if (name := router_name(index)) not in routers)
    return list(itertools.islice(unused, max(0, count - len(routers)))), routers[count:]


def _in_words(plan: PlacementPlan) -> tuple[str, ...]:
    """What could not be given: the first few, and how many more."""
    shown = [str(shortage) for shortage in plan.shortages[:3]]
    more = len(plan.shortages) - len(shown)
    return (*shown, f"and {more} more") if more else tuple(shown)
