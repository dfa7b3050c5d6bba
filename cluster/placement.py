"""Which host holds which expert: pure functions from plain data to a placement table."""

from __future__ import annotations

from collections.abc import Sequence

from ..actors.placement_table import PlacementTable
from ..configs.errors import ConfigError
from ..model.config import ModelConfig


def even_placement(config: ModelConfig, hosts: Sequence[str], *, epoch: int = 1) -> PlacementTable:
    """Spread the experts of every layer evenly: host i of n holds every n-th expert, starting one further each layer.

    Neighbouring experts, which form a group, so land on different hosts, and when n does not divide the experts the
    larger shares go round instead of falling to the same hosts in every layer.

    Raises:
        ConfigError: there are more hosts than experts, so that some would hold nothing.
    """
    if len(hosts) > config.n_routed_experts:
        raise ConfigError(
            f"experts.hosts = {len(hosts)}: the model has {config.n_routed_experts} experts a layer, "
            f"so at most {config.n_routed_experts} hosts can hold one"
        )
    return PlacementTable(
        epoch=epoch,
        first_layer=config.first_k_dense_replace,
        experts=config.n_routed_experts,
        slots={
            host: tuple(
                tuple(range((index + layer) % len(hosts), config.n_routed_experts, len(hosts)))
                for layer in range(len(config.moe_layers))
            )
            for index, host in enumerate(hosts)
        },
    )
