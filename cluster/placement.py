"""Which host holds which expert: pure functions from plain data to a placement table."""

from __future__ import annotations

from collections.abc import Sequence

from ..actors.placement_table import PlacementTable
from ..configs.errors import ConfigError
from ..model.config import ModelConfig


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
