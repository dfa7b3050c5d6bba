"""The plan: a model, nodes and settings in; whether it fits, what is where and what it costs out. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...actors.placement_table import EMPTY, is_cold
from ...configs.deployment import Deployment
from ...configs.errors import ConfigError
from ...model.config import ModelConfig
from ..assembly import compute, drafts
from ..cold_tier import cold_shares
from ..replica_counts import Floats
from ..synthetic_load import zipf_load
from . import assumptions
from .changes import Change, smallest_changes
from .layout import Layout, lay_out, node_memory, node_problems
from .nodes import NodeGroup
from .sizes import ModelSizes, model_sizes
from .step_cost import StepCost, StepCosts, load_seconds

DEFAULT_CONTEXT = 8192
"""Tokens of a request, prompt and answer: what R1's thinking takes for most questions."""

DEFAULT_BATCHES = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class PlacementSummary:
    """Where the experts are, in numbers.

    Attributes:
        hosts: how many there are beside the cold tier.
        slots_per_layer: fewest and most slots that one of these has in a layer.
        cold_hosts: how many the cold tier has.
        cold_slots: slots of each of those and layer.
        cold_share: share of the popularity of those experts that cold hosts alone hold. As a token's experts are distinct,
            cold hosts compute somewhat more than that where popularity is skewed.
        replicas: fewest and most copies that an expert has.
        nodes_per_expert: fewest and most nodes that an expert is on.
        examples: host -> the experts it holds in the first MoE layer, of the first and the last host.
    """

    hosts: int
    slots_per_layer: tuple[int, int]
    cold_hosts: int
    cold_slots: int
    cold_share: float
    replicas: tuple[int, int]
    nodes_per_expert: tuple[int, int]
    examples: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `moray plan` says.

    Attributes:
        model: its name.
        config, sizes: of the model.
        groups: the nodes.
        deployment: the settings.
        context: tokens of one request.
        skew: of the experts' popularity: the n-th of a layer is asked for as n ** -skew.
        layout: which process is where, with what memory.
        problems: why it does not fit; empty if it does.
        changes: what would make it fit, the smallest first.
        placement: None where it does not fit.
        steps: one decode step at each batch size; empty where it does not fit.
        load_s: from nothing to ready, in seconds.
        price_per_hour: of all nodes; None if any has none.
    """

    model: str
    config: ModelConfig
    sizes: ModelSizes
    groups: tuple[NodeGroup, ...]
    deployment: Deployment
    context: int
    skew: float
    layout: Layout
    problems: tuple[str, ...]
    changes: tuple[Change, ...]
    placement: PlacementSummary | None
    steps: tuple[StepCost, ...]
    load_s: float
    price_per_hour: float | None

    @property
    def fits(self) -> bool:
        """Whether all of it does."""
        return not self.problems

    @property
    def requests_at_once(self) -> int:
        """Requests of `context` tokens that all routers' KV pages hold together."""
        page = self.deployment.routers.page_size
        return len(self.layout.routers) * (self.layout.cache_tokens // (-(-self.context // page) * page))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; with the whole placement table."""
        return _as_dict(self)


def make_plan(
    model: str,
    config: ModelConfig,
    groups: Sequence[NodeGroup],
    deployment: Deployment,
    *,
    hosts: int | None = None,
    context: int | None = None,
    cache_tokens: int | None = None,
    batches: Sequence[int] = DEFAULT_BATCHES,
    skew: float = 0.0,
) -> Plan:
    """Plan the deployment of a model on nodes.

    Args:
        model: name to show.
        config: of the model.
        groups: the nodes.
        deployment: settings; its numbers of hosts and of cache tokens do not matter.
        hosts: expert hosts; None for one on every GPU that no router has.
        context: tokens of one request, prompt and answer, and what a router must have pages for; by default 8192, or the
            deployment's or the model's own limit if that is less.
        cache_tokens: KV positions of each router; None for all that its memory leaves.
        batches: requests at once, in all, for each of which a step is computed.
        skew: of the experts' popularity, which is taken to be measured: the n-th of a layer is asked for as n ** -skew.

    Raises:
        ConfigError: the settings contradict the model, or each other.
    """
    most = config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, deployment.max_context or most) if context is None else context
    if not 1 <= context <= most:
        raise ConfigError(f"context = {context}: must be from 1 to {most}, which the model was made for")
    if not config.moe_layers:
        raise ConfigError(f"{model}: has no layer with routed experts, so there is nothing to spread")
    gpus = sum(group.count * group.gpus for group in groups)
    drafting = drafts(deployment, gpus=gpus)
    if drafting == "on" or (drafting == "auto" and config.num_nextn_predict_layers):
        config = config.with_draft_layer()
    sizes = model_sizes(config, compute(deployment, gpus=gpus))
    load = zipf_load(len(config.moe_layers), config.n_routed_experts, exponent=skew) if skew else None
    layout = lay_out(sizes, groups, deployment, hosts=hosts, max_context=context, cache_tokens=cache_tokens, load=load)
    problems = (*layout.problems, *node_problems(layout))
    prices = [None if group.price is None else group.price * group.count for group in groups]
    price = None if None in prices else sum(price for price in prices if price is not None)
    steps: tuple[StepCost, ...] = ()
    changes: Sequence[Change] = ()
    if problems:
        changes = smallest_changes(sizes, groups, deployment, max_context=context, cache_tokens=cache_tokens)
    else:
        costs = StepCosts(sizes, layout, deployment, price_per_hour=price, load=load)
        steps = tuple(costs.step(batch, context) for batch in sorted(set(batches)))
    return Plan(
        model=model,
        config=config,
        sizes=sizes,
        groups=tuple(groups),
        deployment=deployment,
        context=context,
        skew=skew,
        layout=layout,
        problems=problems,
        changes=tuple(changes),
        placement=None if layout.table is None else _summary(layout, load),
        steps=steps,
        load_s=load_seconds(layout),
        price_per_hour=price,
    )


def _summary(layout: Layout, load: Floats | None) -> PlacementSummary:
    table = layout.table
    assert table is not None
    filled = {host: [sum(e != EMPTY for e in layer) for layer in layers] for host, layers in table.slots.items()}
    per_layer = [count for host, counts in filled.items() if not is_cold(host) for count in counts]
    cold = [max(counts) for host, counts in filled.items() if is_cold(host)]
    equal = np.ones((table.layers, table.experts))
    where: dict[tuple[int, int], list[str]] = {}
    for host, layers in table.slots.items():
        for index, held in enumerate(layers):
            for expert in held:
                if expert != EMPTY:
                    where.setdefault((index, expert), []).append(layout.hosts[host].node.name)
    copies, nodes = [len(found) for found in where.values()], [len(set(found)) for found in where.values()]
    names = list(table.slots)
    return PlacementSummary(
        hosts=len(names) - len(cold),
        slots_per_layer=(min(per_layer), max(per_layer)),
        cold_hosts=len(cold),
        cold_slots=max(cold, default=0),
        cold_share=cold_shares(equal if load is None else load, table)[0],
        replicas=(min(copies), max(copies)),
        nodes_per_expert=(min(nodes), max(nodes)),
        examples={name: tuple(table.slots[name][0]) for name in dict.fromkeys((names[0], names[-1]))},
    )


def _as_dict(plan: Plan) -> dict[str, Any]:
    sizes, layout = plan.sizes, plan.layout
    return {
        "model": plan.model,
        "parameters": asdict(sizes.parameters),
        "bytes": {
            "on_disk": sizes.disk_total.total,
            "expert": asdict(sizes.expert),
            "router": asdict(sizes.router.total),
            "kv_per_token": sizes.kv_token_bytes,
        },
        "nodes": [_group(group) for group in plan.groups],
        "fits": plan.fits,
        "problems": list(plan.problems),
        "changes": [asdict(change) for change in plan.changes],
        "devices": [
            {
                "name": device.name,
                "node": device.node.name,
                "capacity": device.capacity,
                "margin": device.margin,
                "used": device.used,
                "fixed": device.fixed,
                "processes": [asdict(process) for process in device.processes],
            }
            for device in layout.devices
        ],
        "node_memory": node_memory(layout),
        "context": plan.context,
        "skew": plan.skew,
        "cache_tokens_per_router": layout.cache_tokens,
        "requests_at_once": plan.requests_at_once,
        "placement": None if plan.placement is None else asdict(plan.placement),
        "shortages": list(layout.shortages),
        "table": None if layout.table is None else layout.table.to_dict(),
        "load_s": plan.load_s,
        "price_per_hour": plan.price_per_hour,
        "steps": [asdict(step) | {"limit": step.limit} for step in plan.steps],
        "assumptions": [asdict(assumption) for assumption in assumptions.ALL],
    }


def _group(group: NodeGroup) -> dict[str, Any]:
    found = asdict(group)
    if group.gpu is not None:
        found["gpu"]["flops"] = dict(group.gpu.flops)
    return found
