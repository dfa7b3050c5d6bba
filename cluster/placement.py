"""Which host holds which expert: pure functions from plain data to a placement table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..actors.placement_table import PlacementTable
from ..configs.errors import ConfigError
from ..model.config import ModelConfig
from .placement_plan import HostSpec, plan_placement


def even_placement(config: ModelConfig, hosts: Sequence[str], *, epoch: int = 1) -> PlacementTable:
    """Spread the experts of every layer evenly: host i of n holds every n-th expert.

    Neighbouring experts, which form a group, so land on different hosts. Where n does not divide the experts, each layer
    gives its larger shares to the hosts that are next in turn: no two hosts differ by more than one expert in all.

    Raises:
        ConfigError: there are more hosts than experts, so that some would hold nothing.
    """
    if len(hosts) > config.n_routed_experts:
        raise ConfigError(
            f"experts.hosts = {len(hosts)}: the model has {config.n_routed_experts} experts a layer, "
            f"so at most {config.n_routed_experts} hosts can hold one"
        )
    larger_shares = config.n_routed_experts % len(hosts)
    return PlacementTable(
        epoch=epoch,
        first_layer=config.first_k_dense_replace,
        experts=config.n_routed_experts,
        slots={
            host: tuple(
                tuple(range((index + layer * larger_shares) % len(hosts), config.n_routed_experts, len(hosts)))
                for layer in range(len(config.moe_layers))
            )
            for index, host in enumerate(hosts)
        },
    )


def next_placement(
    config: ModelConfig, hosts: Sequence[str], *, min_replicas: int = 1, current: PlacementTable | None = None
) -> PlacementTable:
    """The table for these hosts: every expert on `min_replicas` of them, their shares equal, as little moved as can be.

    Args:
        config: of the model.
        hosts: those there will be. Hosts of `current` that are not among them hold nothing afterwards.
        min_replicas: copies of each expert, on distinct hosts.
        current: the table to start from, if any; the new one has the epoch after it.

    Raises:
        ConfigError: so many hosts, or so few, cannot be used.
    """
    if len(hosts) < min_replicas:
        raise ConfigError(
            f"experts.min_replicas = {min_replicas}: copies of an expert are on distinct hosts, and there are {len(hosts)}; "
            "use as many hosts or fewer replicas"
        )
    if current is None and min_replicas == 1:
        return even_placement(config, hosts)
    even_placement(config, hosts)  # refuses what cannot be
    share, larger = divmod(config.n_routed_experts * min_replicas, len(hosts))
    specs = [
        HostSpec(
            host,
            # As `even_placement`: each layer gives its larger shares to the hosts that are next in turn.
            slots=tuple(
                share + ((index + layer * larger) % len(hosts) < larger) for layer in range(len(config.moe_layers))
            ),
        )
        for index, host in enumerate(hosts)
    ]
    load = np.ones((len(config.moe_layers), config.n_routed_experts))
    return plan_placement(
        load, specs, first_layer=config.first_k_dense_replace, current=current, min_replicas=min_replicas
    ).table
