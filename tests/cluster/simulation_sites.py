"""Small clusters to simulate, with costs that are sums of powers of two: times come out exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moray.actors.router import RouterSettings
from moray.cluster.placement import plan_next
from moray.cluster.simulation.cluster import Recovery, Site
from moray.cluster.simulation.draws import Wire
from moray.model.config import ModelConfig

from .plan_models import R1

SMALL: dict[str, Any] = R1 | {
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
"""R1 with 4 MoE layers of 16 experts."""

SMALL_CONFIG = ModelConfig.from_dict(SMALL)
MOE_LAYERS, DENSE_LAYERS = 4, 1


@dataclass(frozen=True)
class PlainCosts:
    """Costs that depend on hardly anything, in seconds."""

    overlap: bool = False
    cores: float | None = None
    wake_s: float = 0.0
    step: float = 1 / 64
    layer: float = 1 / 256
    shared: float = 0.0
    host: float = 1 / 128
    host_pair: float = 0.0
    way: float = 1 / 512
    front_step: float = 0.0
    taking_in: float = 0.0

    @property
    def crowded(self) -> float:
        return self.cores or 0.0

    def router_step(self, tokens: int, decoding: int, sampled: int, kv_positions: int) -> float:
        return self.step

    def router_layer(self, tokens: int, kv_positions: int, kv_rows: int, longest: int) -> float:
        return self.layer

    def shared_experts(self, tokens: int) -> float:
        return self.shared

    def host_layer(self, rows: int, experts: int) -> float:
        return self.host + rows * self.host_pair

    def exchange(self, sent: int, received: int, hosts: int) -> float:
        return self.way * ((sent > 0) + (received > 0))

    def front(self, tokens: int) -> float:
        return self.front_step

    def request(self, prompt: int) -> float:
        return self.taking_in

    @property
    def one_step(self) -> float:
        """Of a router that nobody keeps waiting."""
        one_layer = self.layer + max(self.shared, self.way + self.host + self.way)
        return self.step + DENSE_LAYERS * self.layer + MOE_LAYERS * one_layer


PLAIN = PlainCosts()

RECOVERY = Recovery(
    start_s=2.0,
    standby_start_s=0.25,
    disk=2.0**30,
    expert_bytes=2**26,
    router_bytes=2**30,
    process_noticed_s=1 / 64,
    node_noticed_s=1 / 8,
    router_silent_s=1 / 2,
    node_given_up_s=4.0,
    drain_s=1.0,
)
"""A host of four holds 16 experts, which take a second."""


def host_names(count: int) -> list[str]:
    return [f"expert-host-{index}" for index in range(count)]


def small_site(
    hosts: int = 4,
    routers: int = 1,
    *,
    costs: PlainCosts = PLAIN,
    min_replicas: int = 1,
    pages: int = 512,
    token_budget: int = 128,
    max_running: int = 32,
    restore_timeout_s: float = 60.0,
    hosts_on_a_node: int = 2,
    **changes: Any,
) -> Site:
    """Hosts on nodes `node0-0`, `node0-1`, ..., and routers `router-0`, ... on one of their own, `node1-0`."""
    names = host_names(hosts)
    nodes = {name: f"node0-{index // hosts_on_a_node}" for index, name in enumerate(names)}
    router_names = tuple(f"router-{index}" for index in range(routers))
    return Site(
        config=SMALL_CONFIG,
        table=plan_next(SMALL_CONFIG, names, min_replicas=min_replicas, nodes=nodes).table,
        routers=router_names,
        settings=RouterSettings(
            page_size=16,
            pages=pages,
            max_context=min(4096, 16 * pages),
            token_budget=token_budget,
            max_running=max_running,
            max_waiting=64,
            restore_timeout_s=restore_timeout_s,
        ),
        costs=costs,
        wire=Wire.of_moray(SMALL_CONFIG.hidden_size, torch.bfloat16),
        min_replicas=min_replicas,
        nodes=nodes | dict.fromkeys(router_names, "node1-0"),
        **{"recovery": RECOVERY, **changes},
    )
