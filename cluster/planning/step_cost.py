"""What one decode step costs, and on what: reading weights and KV pages, computing, sending, waiting, starting kernels.

A model of bounds: each phase takes as long as its slowest resource, phases follow each other as they do in
`model/transformer.py` (a router overlaps shared experts with the routed ones, and nothing else), and the hosts' work is that
of the busiest one, with tokens shared out by the functions that share them out when it is for real.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...actors.placement_table import is_cold
from ...configs.deployment import Deployment
from ..replica_counts import Floats
from . import assumptions
from .footprint import Device
from .layout import Layout
from .nodes import NodeGroup
from .sizes import ModelSizes
from .traffic import HostShare, LayerTraffic, random_experts

_SAMPLES = 4
"""Layers that experts are drawn for; the mean of their busiest hosts moves by a few percent from seed to seed."""

ROUTER_MEMORY = "memory bandwidth of the router"
ROUTER_FLOPS = "arithmetic of the router"
HOST_MEMORY = "memory bandwidth of the expert hosts"
HOST_FLOPS = "arithmetic of the expert hosts"
COLD_MEMORY = "memory bandwidth of the cold hosts"
COLD_FLOPS = "arithmetic of the cold hosts"
NETWORK = "network"
COPIES = "copies through a node's memory"
LATENCY = "latency of the links"
STARTING = "starting operations from Python"
QUEUE = "expert hosts busy with other routers"


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of a step, bound by one resource."""

    phase: str
    resource: str
    seconds: float


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """One router's traffic in one MoE layer: bytes sent, and received, and those of both that leave the node."""

    sent: float
    received: float
    between_nodes: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """One decode step at one number of requests.

    Attributes:
        batch: requests in all, shared out over the routers; per_router: those of one.
        context: tokens each has in its KV pages.
        seconds: of the step: between two tokens of each request.
        phases, resources: the seconds by phase, and by what they are bound by.
        layer: the phases of one MoE layer, in order, for the busiest host.
        shared_s: what the shared experts of such a layer take meanwhile.
        traffic: of such a layer.
        router_read, host_read: bytes that a router, and the busiest host, read from memory in the step.
        tokens_per_user, tokens_in_all: a second.
        cost_per_million: of generated tokens, or None without a price.
        notes: what must be different for this batch to run at all.
    """

    batch: int
    per_router: int
    context: int
    seconds: float
    phases: Mapping[str, float]
    resources: Mapping[str, float]
    layer: tuple[Span, ...]
    shared_s: float
    traffic: LayerBytes
    router_read: float
    host_read: float
    tokens_per_user: float
    tokens_in_all: float
    cost_per_million: float | None
    notes: tuple[str, ...]

    @property
    def limit(self) -> str:
        """The resource that takes most of the time."""
        return max(self.resources, key=lambda resource: self.resources[resource])


class StepCosts:
    """Computes the cost of steps of one layout, which must have a table; of steps without drafts, even where there are some.

    Args:
        sizes, layout, deployment: what is planned.
        price_per_hour: of all nodes together.
        load: [L, E] how much is asked of each expert; None for equally much.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        layout: Layout,
        deployment: Deployment,
        *,
        price_per_hour: float | None,
        load: Floats | None = None,
    ) -> None:
        assert layout.table is not None, "where nothing is placed there are no steps"
        self._sizes, self._config, self._layout, self._deployment = sizes, sizes.config, layout, deployment
        self._moe_layers = self._config.num_hidden_layers - self._config.first_k_dense_replace
        self._price = price_per_hour
        self._load = load
        self._router = next(iter(layout.routers.values()))
        self._traffic = LayerTraffic(layout.table, hidden_size=self._config.hidden_size, dtype=sizes.compute.dtype)
        self._routers_on_node = sum(device.node.name == self._router.node.name for device in layout.routers.values())

    def step(self, batch: int, context: int) -> StepCost:
        """One step of `batch` requests that each have `context` tokens in the cache."""
        config, routers = self._config, len(self._layout.routers)
        per_router = -(-batch // routers)
        attention = self._attention(per_router, context)
        layer, shared_s, traffic, host_s, host_read = self._moe_layer(per_router)
        moe_layers, dense_layers = self._moe_layers, config.first_k_dense_replace
        spans = [_times(attention, config.num_hidden_layers)]
        if dense_layers:
            one = self._router_span("dense layers", self._sizes.router.dense_mlp.total, per_router, 0.0, 4)
            spans.append(_times(one, dense_layers))
        spans += [_times(span, moe_layers) for span in layer]
        spans.append(self._router_span("head", self._sizes.router.head.total, per_router, 0.0, 8))
        seconds = sum(span.seconds for span in spans)
        busy = host_s * moe_layers * routers
        if busy > seconds:
            spans.append(Span("waiting for hosts", QUEUE, busy - seconds))
            seconds = busy
        in_all = batch / seconds
        return StepCost(
            batch=batch,
            per_router=per_router,
            context=context,
            seconds=seconds,
            phases=_sums((span.phase, span.seconds) for span in spans),
            resources=_sums((span.resource, span.seconds) for span in spans),
            layer=(attention, *layer),
            shared_s=shared_s,
            traffic=traffic,
            router_read=self._router_read(per_router, context),
            host_read=host_read * moe_layers,
            tokens_per_user=1 / seconds,
            tokens_in_all=in_all,
            cost_per_million=None if self._price is None else self._price / 3600 / in_all * 1e6,
            notes=self._notes(per_router, context),
        )

    # ---- the router -------------------------------------------------------------------------------------------------

    def _attention(self, tokens: int, context: int) -> Span:
        """Attention, norms and gate of one layer."""
        config, sizes = self._config, self._sizes
        weights = sizes.router.attention.total + sizes.router.gate.total
        pages = tokens * context * sizes.kv_token_bytes / config.cached_layers
        scores = 2.0 * tokens * context * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
        operations = int(assumptions.ROUTER_OPERATIONS.value)
        return self._router_span("attention and gate", weights, tokens, scores, operations, more_read=pages)

    def _router_span(
        self, phase: str, weights: float, tokens: int, more_flops: float, operations: int, *, more_read: float = 0.0
    ) -> Span:
        """A phase that multiplies `tokens` rows with `weights` bytes of matrices.

        Those that are not kept in FP8 beside others that are (gate, head, kv_b) so count twice as arithmetic, which binds
        nothing at decode's batch sizes.
        """
        products = 2.0 * tokens * weights / self._weight_bytes
        return _slowest(
            phase,
            {
                ROUTER_MEMORY: (weights + more_read) / _bandwidth(self._router),
                ROUTER_FLOPS: products / self._rate(self._router) + more_flops / _flops(self._router, "fp16"),
                STARTING: operations * assumptions.OPERATION.value,
            },
        )

    def _router_read(self, tokens: int, context: int) -> float:
        router, config = self._sizes.router, self._config
        layers = router.attention * config.num_hidden_layers + router.dense_mlp * config.first_k_dense_replace
        moe = (router.gate + router.shared_experts) * self._moe_layers
        row = self._sizes.kv_token_bytes / config.cached_layers
        return (layers + moe + router.head).total + tokens * context * row * config.num_hidden_layers

    # ---- one MoE layer ----------------------------------------------------------------------------------------------

    def _moe_layer(self, tokens: int) -> tuple[tuple[Span, ...], float, LayerBytes, float, float]:
        """Spans after the gate, seconds of the shared experts, traffic, and seconds and bytes of the busiest host."""
        config = self._config
        layers = config.moe_layers
        shared = self._router_span("shared experts", self._sizes.router.shared_experts.total, tokens, 0.0, 4)
        if not config.n_shared_experts:
            shared = Span("shared experts", STARTING, 0.0)
        if not layers:
            return (), 0.0, LayerBytes(0.0, 0.0, 0.0), 0.0, 0.0
        sums: dict[tuple[str, str], float] = {}
        sent = received = away = busy = read = 0.0
        for sample in range(_SAMPLES):
            layer = layers[sample * len(layers) // _SAMPLES]
            wanted = None if self._load is None else self._load[layer - layers[0]]
            chosen = random_experts(config, tokens, seed=1000 * tokens + sample, popularity=wanted)
            shares = self._traffic.shares(layer, chosen)
            spans = self._one_layer(shares, shared)
            for span in spans:
                sums[span.phase, span.resource] = sums.get((span.phase, span.resource), 0.0) + span.seconds
            busy += max(self._host_span(name, share).seconds for name, share in shares.items())
            read += max(share.experts * self._sizes_of(name).expert.total for name, share in shares.items())
            sent += sum(share.dispatch.total for share in shares.values())
            received += sum(share.combine.total for share in shares.values())
            away += sum(
                share.dispatch.total + share.combine.total for name, share in shares.items() if self._is_remote(name)
            )
        mean = tuple(Span(phase, resource, seconds / _SAMPLES) for (phase, resource), seconds in sums.items())
        order = ["dispatch", "experts", "combine", "shared experts"]
        in_order = tuple(sorted(mean, key=lambda span: order.index(span.phase)))
        return (
            in_order,
            shared.seconds,
            LayerBytes(sent / _SAMPLES, received / _SAMPLES, away / _SAMPLES),
            busy / _SAMPLES,
            read / _SAMPLES,
        )

    def _one_layer(self, shares: Mapping[str, HostShare], shared: Span) -> list[Span]:
        out = self._transfer("dispatch", {name: share.dispatch.total for name, share in shares.items()})
        experts = max(
            (self._host_span(name, share) for name, share in shares.items()),
            key=lambda span: span.seconds,
        )
        back = self._transfer("combine", {name: share.combine.total for name, share in shares.items()})
        spans = [*out, experts, *back]
        longer = shared.seconds - sum(span.seconds for span in spans)
        if longer > 0:
            spans.append(Span("shared experts", shared.resource, longer))
        return spans

    def _host_span(self, host: str, share: HostShare) -> Span:
        device, sizes = self._layout.hosts[host], self._sizes_of(host)
        flops = 2.0 * share.pairs * sizes.expert_parameters
        return _slowest(
            "experts",
            {
                COLD_MEMORY if is_cold(host) else HOST_MEMORY: share.experts * sizes.expert.total / _bandwidth(device),
                COLD_FLOPS if is_cold(host) else HOST_FLOPS: flops / self._rate(device),
                STARTING: assumptions.HOST_OPERATIONS.value * assumptions.OPERATION.value,
            },
        )

    def _transfer(self, phase: str, frames: Mapping[str, int]) -> list[Span]:
        """All frames of one direction: those to other nodes through the network, the others through the node's memory."""
        remote = {name: count for name, count in frames.items() if self._is_remote(name)}
        local = sum(frames.values()) - sum(remote.values())
        candidates = {COPIES: 2 * local / self._copy_rate(), NETWORK: 0.0}
        latency = assumptions.SHM_LATENCY.value
        if remote:
            latency = assumptions.NETWORK_LATENCY.value
            groups: dict[str, tuple[NodeGroup, int]] = {}
            for name, count in remote.items():
                node = self._layout.hosts[name].node
                groups[node.name] = (node.group, groups.get(node.name, (node.group, 0))[1] + count)
            own = sum(remote.values()) * self._routers_on_node / network_rate(self._router.node.group)
            theirs = max(count * len(self._layout.routers) / network_rate(group) for group, count in groups.values())
            candidates[NETWORK] = max(own, theirs)
        return [Span(phase, LATENCY, latency), _slowest(phase, candidates)]

    def _sizes_of(self, host: str) -> ModelSizes:
        return self._layout.cold_sizes if is_cold(host) else self._sizes

    def _is_remote(self, host: str) -> bool:
        return self._layout.hosts[host].node.name != self._router.node.name

    def _copy_rate(self) -> float:
        return assumptions.PCIE.value if self._router.node.group.gpus else _bandwidth(self._router)

    # ---- rates ------------------------------------------------------------------------------------------------------

    @property
    def _weight_bytes(self) -> int:
        return (
            1 if self._sizes.compute.keep_fp8 and self._config.weights_are_fp8 else self._sizes.compute.dtype.itemsize
        )

    def _rate(self, device: Device) -> float:
        return _flops(device, "fp8" if self._weight_bytes == 1 else "fp16")

    def _notes(self, per_router: int, context: int) -> tuple[str, ...]:
        notes = []
        page = self._deployment.routers.page_size
        pages = per_router * -(-context // page)
        if pages * page > self._layout.cache_tokens:
            notes.append(f"KV pages for {self._layout.cache_tokens // (-(-context // page) * page)} a router only")
        if per_router > self._deployment.routers.max_running:
            notes.append(f"needs routers.max_running >= {per_router}")
        return tuple(notes)


def network_rate(group: NodeGroup) -> float:
    """Bytes of payload a second that a node sends, or receives."""
    return (group.network or assumptions.NETWORK.value) * assumptions.NETWORK_EFFICIENCY.value


def load_seconds(layout: Layout) -> float:
    """From nothing to ready: every node reads what its processes hold, each at its own disk's speed."""
    by_node: dict[str, float] = {}
    for device in layout.devices:
        read = sum(process.disk_bytes for process in device.processes)
        rate = device.node.group.disk or assumptions.DISK.value
        by_node[device.node.name] = by_node.get(device.node.name, 0.0) + read / rate
    return assumptions.START.value + max(by_node.values(), default=0.0)


def memory_peak(group: NodeGroup) -> float:
    """Bytes a second that a GPU of these nodes, or a node without any, can read at most."""
    return group.gpu.bandwidth if group.gpu else group.memory_bandwidth or assumptions.CPU_MEMORY_BANDWIDTH.value


def arithmetic_peak(group: NodeGroup, arithmetic: str) -> float:
    """Operations a second that a GPU of these nodes, or a node without any, can do at most; see `GpuKind.peak`."""
    return group.gpu.peak(arithmetic) if group.gpu else group.cpu_flops or assumptions.CPU_FLOPS.value


def _bandwidth(device: Device) -> float:
    return memory_peak(device.node.group) * assumptions.MEMORY_EFFICIENCY.value


def _flops(device: Device, arithmetic: str) -> float:
    return arithmetic_peak(device.node.group, arithmetic) * assumptions.FLOPS_EFFICIENCY.value


def _slowest(phase: str, candidates: Mapping[str, float]) -> Span:
    resource = max(candidates, key=lambda name: candidates[name])
    return Span(phase, resource, candidates[resource])


def _times(span: Span, count: int) -> Span:
    return Span(span.phase, span.resource, span.seconds * count)


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, seconds in pairs:
        sums[name] = sums.get(name, 0.0) + seconds
    return sums
