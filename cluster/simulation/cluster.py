"""The cluster that is simulated: who is where, by which rules, and what it takes to restore somebody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...actors.front_channel import OF_ROUTERS
from ...actors.placement_table import EMPTY, PlacementTable
from ...actors.router import RouterSettings
from ...configs.autoscale import Autoscale
from ...configs.deployment import Deployment
from ...configs.errors import ConfigError
from ...model.config import ModelConfig
from ..planning import assumptions
from ..planning.assumptions import Assumption
from ..planning.plan import Plan
from ..planning.step_cost import network_rate
from .costs import CostModel
from .draws import ReplicaChoice, Wire

PROCESS_NOTICED = Assumption(
    "until everybody knows that a process has ended",
    0.01,
    "s",
    "8 ms over shared memory and 10 ms over gloo were measured",
)
NODE_NOTICED = Assumption(
    "until routers ask others for what a silent node owes",
    0.1,
    "s",
    "actors/host_latency.py: 60 ms, or twice what is usual, on top of what is usual",
)
STANDBY_START = Assumption(
    "until a warm process begins to load", 0.2, "s", "guess: 0.24 and 0.64 s were measured until tiny-r1 answered again"
)
MOST_ROUTERS = 64
"""So many routers are modelled one by one; where there are more, each stands for several."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What it takes to have a process back, or somewhere else.

    Attributes:
        start_s: from its end until a new one begins to load.
        standby: so many warm processes are there, which take `standby_start_s` instead.
        disk: bytes a second that a node reads of the checkpoint.
        copies: bytes a second that come from other hosts beside that, where they hold the same experts; 0 for none.
        expert_bytes: one expert of one layer on the disk; router_bytes: all that a router reads.
        process_noticed_s: after so long those who waited for an ended process know.
        node_noticed_s: after so long routers that waited for a host on a silent node ask others.
        router_silent_s: after so long fronts give up a router on a silent node.
        node_given_up_s: after so long the controller goes on without the node.
        drain_s: how long a router that is to leave goes on with its requests.
    """

    start_s: float = assumptions.START.value
    standby: int = 0
    standby_start_s: float = STANDBY_START.value
    disk: float = assumptions.DISK.value
    copies: float = 0.0
    expert_bytes: int = 0
    router_bytes: int = 0
    process_noticed_s: float = PROCESS_NOTICED.value
    node_noticed_s: float = NODE_NOTICED.value
    router_silent_s: float = OF_ROUTERS.silent_after_s
    node_given_up_s: float = 10.0
    drain_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster.

    Attributes:
        config: of the model.
        table: the placement to start with; its hosts are those of the cluster.
        routers: their ids: as many as are modelled.
        settings: the limits of each router.
        costs: what everything costs.
        wire: what frames carry.
        lockstep: every GPU is router and host at once, and all go through every layer together, as in systems whose
            attention is data parallel over the GPUs that hold the experts. Else routers are apart, as Moray has them.
        twins: routers that each modelled one stands for. They get the same requests at the same moment.
        choice: how tokens are shared out over replicas.
        min_replicas, spare_slots: see `plan_next`.
        nodes: process -> its node.
        free_seats: nodes of the devices on which nothing is yet, each once for each device; None: there is always another.
        slots_per_host: experts that a host has memory for, all layers together; None: as many as are asked for.
        recovery: see there.
        autoscale: the policy; heartbeat_s: how often reports come.
        gpus: devices, those that nothing is on included; machines: nodes. For rates per device and per node.
    """

    config: ModelConfig
    table: PlacementTable
    routers: tuple[str, ...]
    settings: RouterSettings
    costs: CostModel
    wire: Wire
    lockstep: bool = False
    twins: int = 1
    choice: ReplicaChoice = "least_busy"
    min_replicas: int = 1
    spare_slots: int = 0
    nodes: Mapping[str, str] = field(default_factory=dict)
    free_seats: tuple[str, ...] | None = ()
    slots_per_host: int | None = None
    recovery: Recovery = Recovery()
    autoscale: Autoscale = field(default_factory=Autoscale)
    heartbeat_s: float = 1.0
    gpus: int = 0
    machines: int = 1


def site_from_plan(plan: Plan, costs: CostModel, *, most_routers: int = MOST_ROUTERS) -> Site:
    """The cluster of a plan: routers apart from hosts.

    Args:
        plan: must fit.
        costs: of its devices.
        most_routers: see `MOST_ROUTERS`.

    Raises:
        ConfigError: the plan does not fit.
    """
    layout, deployment = plan.layout, plan.deployment
    if not plan.fits or layout.table is None:
        raise ConfigError(
            f"{plan.model} does not fit on these nodes: {'; '.join(plan.problems)} (`moray plan` says more)"
        )
    names = list(layout.routers)
    twins = next(
        twins for twins in range(1, len(names) + 1) if len(names) / twins <= most_routers and not len(names) % twins
    )
    groups = plan.groups
    with_gpus = [group for group in groups if group.gpus]
    free = [device.node.name for device in layout.devices if not device.processes]
    return Site(
        config=plan.config,
        table=layout.table,
        routers=tuple(names[: len(names) // twins]),
        settings=_settings(plan),
        costs=costs,
        wire=Wire.of_moray(plan.config.hidden_size, plan.sizes.compute.dtype),
        twins=twins,
        min_replicas=deployment.experts.min_replicas,
        spare_slots=deployment.experts.spare_slots,
        nodes={name: device.node.name for name, device in (*layout.routers.items(), *layout.hosts.items())},
        free_seats=tuple(free) if with_gpus else None,
        slots_per_host=_slots_per_host(plan),
        recovery=_recovery(plan, deployment),
        autoscale=deployment.autoscale,
        heartbeat_s=deployment.supervision.heartbeat_s,
        gpus=sum(group.count * group.gpus for group in groups),
        machines=sum(group.count for group in with_gpus or groups),
    )


def _settings(plan: Plan) -> RouterSettings:
    """As `assembly.router_settings` has it, with the pages that the plan gives."""
    routers = plan.deployment.routers
    most = plan.deployment.max_context or plan.config.max_position_embeddings
    return RouterSettings(
        page_size=routers.page_size,
        pages=plan.layout.cache_tokens // routers.page_size,
        max_context=min(most, plan.layout.cache_tokens),
        token_budget=routers.token_budget,
        max_running=routers.max_running,
        max_waiting=routers.max_waiting,
        restore_timeout_s=routers.restore_timeout_s,
        target_itl_s=routers.target_itl_s,
        max_wait_s=routers.max_wait_s,
    )


def _slots_per_host(plan: Plan) -> int | None:
    """What the fullest host's device has memory for."""
    expert, found = max(1, plan.sizes.expert.total), []
    for name, device in plan.layout.hosts.items():
        if device.capacity is not None:
            on_it = sum(process.role == "expert_host" for process in device.processes)
            found.append(plan.layout.process(name).slots + device.left // expert // on_it)
    return min(found, default=None)


def _recovery(plan: Plan, deployment: Deployment) -> Recovery:
    groups = plan.groups
    return Recovery(
        standby=deployment.experts.standby,
        disk=min(group.disk or assumptions.DISK.value for group in groups),
        copies=min(network_rate(group) for group in groups) if deployment.experts.copy_weights else 0.0,
        expert_bytes=plan.sizes.disk_expert.total,
        router_bytes=plan.sizes.disk_dense.total,
        node_given_up_s=deployment.supervision.replace_after_s,
        drain_s=deployment.routers.drain_timeout_s,
    )


def slots_of(table: PlacementTable, host: str) -> int:
    """Experts that a host holds, all layers together."""
    return sum(expert != EMPTY for layer in table.slots[host] for expert in layer)
