"""What the parts of a step cost on GPUs: bounds by memory and arithmetic, with how far kernels stay behind them as constants.

Sizes come from `cluster/planning`, which has them from the functions that serve the model. Constants are `Assumption`s: those
of `MORAY` are the plan's own, those in `published_kernels.py` what authors of kernels publish of each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

from ..planning import assumptions
from ..planning.assumptions import Assumption
from ..planning.layout import Layout
from ..planning.nodes import NodeGroup
from ..planning.sizes import ModelSizes
from ..planning.step_cost import arithmetic_peak, memory_peak, network_rate

_ATTENTION_PRODUCTS = 5
"""Matrix products of a layer's attention: both compressions in one, queries, keys, values and the output."""

_ATTENTION_KERNELS = 9
"""Its other kernels, gate and packing included: norms, roundings to FP8, rotations, writing the cache, choosing experts."""

_MLP_PRODUCTS = 2
_MLP_KERNELS = 3
"""Of an MLP beside its two products (gate and up are one): both roundings to FP8 and SwiGLU, which may share one."""

_SAMPLING_PASSES = 5
"""Over the logits in fp32: penalties, softmax, cumulated sums, noise, maximum."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """How far kernels stay behind what their GPU could do.

    A kernel takes the square root of the sum of the squares of both bounds, and a constant: where it is bound by one alone
    this is that one, and where both bind it is more, as it is when reading and computing hide each other incompletely.

    Attributes:
        memory: share of the bandwidth; arithmetic: share of the peak; both of matrix products.
        product_s: of each matrix product beyond its bounds.
        other_s: of each other kernel beyond the bytes it moves.
        start_s: a kernel starts no earlier than that after the one before, whatever they do.
        attention_memory, attention_arithmetic: of attention over cached latents.
        expanded_arithmetic: of attention over keys and values of each head.
        step_s: between two steps.
    """

    memory: Assumption
    arithmetic: Assumption
    product_s: Assumption
    other_s: Assumption
    start_s: Assumption
    attention_memory: Assumption
    attention_arithmetic: Assumption
    expanded_arithmetic: Assumption
    step_s: Assumption

    def __iter__(self) -> Iterator[Assumption]:
        return (getattr(self, field.name) for field in fields(self))


_NOTHING = Assumption("of a kernel beyond its bounds", 0.0, "s", "in the time to start it from Python, which is more")

MORAY = Kernels(
    memory=assumptions.MEMORY_EFFICIENCY,
    arithmetic=assumptions.FLOPS_EFFICIENCY,
    product_s=_NOTHING,
    other_s=_NOTHING,
    start_s=assumptions.OPERATION,
    attention_memory=assumptions.MEMORY_EFFICIENCY,
    attention_arithmetic=assumptions.FLOPS_EFFICIENCY,
    expanded_arithmetic=assumptions.FLOPS_EFFICIENCY,
    step_s=Assumption("a router between two steps", 1e-3, "s", "guess: scheduling and sampling, in Python"),
)
"""This project's kernels, which have not been measured on GPUs: what `moray plan` takes for granted."""


class Exchange(Protocol):
    """Links of one router, or of one GPU that is router and host."""

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """Its constants."""
        ...

    def seconds(self, sent: int, received: int) -> float:
        """On their way, of both directions one after the other."""
        ...

    def computing(self, tokens: int) -> float:
        """Of the GPU, for sending and receiving the rows of so many tokens of its own, there and back."""
        ...

    @property
    def computing_share(self) -> float:
        """Of the GPU, taken from everything else it computes."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedLinks:
    """The links of a router of a plan: shared memory within its node, the network to others.

    Attributes:
        remote: share of the hosts that are on other nodes.
        network: bytes per second that this router has of its node's network.
        copies: bytes per second through its node's memory.
    """

    remote: float
    network: float
    copies: float

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """See `Exchange`."""
        return assumptions.SHM_LATENCY, assumptions.NETWORK_LATENCY, assumptions.PCIE, assumptions.NETWORK_EFFICIENCY

    def seconds(self, sent: int, received: int) -> float:
        """See `Exchange`."""
        return sum(self._one_way(count) for count in (sent, received) if count)

    def _one_way(self, count: int) -> float:
        latency = (assumptions.NETWORK_LATENCY if self.remote else assumptions.SHM_LATENCY).value
        return latency + max(count * self.remote / self.network, 2 * count * (1 - self.remote) / self.copies)

    def computing(self, tokens: int) -> float:  # noqa: ARG002
        """Nothing: the time is among that of starting operations."""
        return 0.0

    @property
    def computing_share(self) -> float:
        """Nothing."""
        return 0.0


class GpuCosts:
    """`CostModel` of GPUs.

    Args:
        sizes: of the model.
        router, host: the nodes whose GPUs, or whose CPUs where they have none, routers and hosts compute on.
        kernels: constants of these GPUs' kernels.
        exchange: the links.
        overlap: see `CostModel`.
        expanded: prompts are attended to over the keys and values of each head (as most engines do for prefill), not over
            cached latents. For clusters that compute prompts alone.
        front_token_s: of the front for each token.
    """

    cores: float | None = None
    crowded = 0.0
    wake_s = 0.0

    def __init__(
        self,
        sizes: ModelSizes,
        *,
        router: NodeGroup,
        host: NodeGroup,
        kernels: Kernels,
        exchange: Exchange,
        overlap: bool = False,
        expanded: bool = False,
        front_token_s: float = 0.0,
    ) -> None:
        self.overlap = overlap
        self._sizes, self._config = sizes, sizes.config
        self._router, self._host = router, host
        self._kernels = kernels
        self._exchange = exchange
        self._expanded = expanded
        self._front_token_s = front_token_s
        self._keeps_fp8 = sizes.compute.keep_fp8 and self._config.weights_are_fp8
        self._item = 1 if self._keeps_fp8 else sizes.compute.dtype.itemsize
        self._act = sizes.compute.dtype.itemsize
        self._free = 1 - exchange.computing_share

    @classmethod
    def from_layout(cls, sizes: ModelSizes, layout: Layout, *, front_token_s: float = 0.0) -> GpuCosts:
        """Of a plan's first router, with the slowest of its hosts, and this project's kernels."""
        device = next(iter(layout.routers.values()))
        hosts = list(layout.hosts.values())
        slowest = min(hosts, key=lambda host: memory_peak(host.node.group)).node.group
        remote = sum(host.node.name != device.node.name for host in hosts) / len(hosts)
        beside = sum(other.node.name == device.node.name for other in layout.routers.values())
        group = device.node.group
        links = PlannedLinks(
            remote=remote,
            network=network_rate(group) / beside,
            copies=assumptions.PCIE.value if group.gpus else memory_peak(group) * assumptions.MEMORY_EFFICIENCY.value,
        )
        return cls(sizes, router=group, host=slowest, kernels=MORAY, exchange=links, front_token_s=front_token_s)

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """Everything taken for granted."""
        return (*self._kernels, *self._exchange.assumptions)

    # ---- CostModel --------------------------------------------------------------------------------------------------

    def router_step(self, tokens: int, decoding: int, sampled: int, kv_positions: int) -> float:  # noqa: ARG002
        """See `CostModel`."""
        config, router = self._config, self._sizes.router
        dense = self._mlp(router.dense_mlp.total, tokens, config.intermediate_size)
        head = self._product(self._router, router.head.total, sampled, 1, moved=sampled * config.vocab_size * 4)
        logits = self._other(self._router, _SAMPLING_PASSES * sampled * config.vocab_size * 4, _SAMPLING_PASSES)
        return dense * config.first_k_dense_replace + head + logits + self._kernels.step_s.value

    def router_layer(self, tokens: int, kv_positions: int, kv_rows: int, longest: int) -> float:  # noqa: ARG002
        """See `CostModel`."""
        if not tokens:
            return 0.0
        config, sizes = self._config, self._sizes
        weights = sizes.router.attention.total + sizes.router.gate.total
        wide = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        moved = tokens * (4 * config.hidden_size + 2 * wide) * self._act
        products = self._product(self._router, weights, tokens, _ATTENTION_PRODUCTS, moved=moved)
        if self._expanded and kv_rows > tokens:
            # Keys and values of what was computed before are made again.
            up = 2.0 * self._up_parameters * (kv_rows - tokens)
            products += up / (self._peak(self._router, "fp16") * self._kernels.arithmetic.value)
        others = self._other(self._router, tokens * self._attention_bytes, _ATTENTION_KERNELS)
        computed = products + self._attend(kv_positions, kv_rows) + others
        started = assumptions.ROUTER_OPERATIONS.value * self._kernels.start_s.value
        return max(computed, started) / self._free + self._exchange.computing(tokens)

    def shared_experts(self, tokens: int) -> float:
        """See `CostModel`."""
        if not self._config.n_shared_experts:
            return 0.0
        width = self._config.moe_intermediate_size * self._config.n_shared_experts
        return self._mlp(self._sizes.router.shared_experts.total, tokens, width)

    def host_layer(self, rows: int, experts: int) -> float:
        """See `CostModel`."""
        if not rows:
            return 0.0
        config, sizes = self._config, self._sizes
        hidden, width = config.hidden_size, config.moe_intermediate_size
        flops = 2.0 * rows * sizes.expert_parameters
        weights = experts * sizes.expert.total
        moved = rows * (hidden * (self._item + self._act) + width * (2 * self._act + self._item))
        products = self._bounds(self._host, weights + moved, flops / self._rate(self._host))
        # Rows are brought into the order of their experts, and back; SwiGLU reads both halves and rounds.
        moved = rows * (2 * hidden * (self._item + self._act) + width * (2 * self._act + self._item))
        others = self._other(self._host, moved, _MLP_KERNELS) + _MLP_PRODUCTS * self._kernels.product_s.value
        started = assumptions.HOST_OPERATIONS.value * self._kernels.start_s.value
        return max(products + others, started) / self._free

    def exchange(self, sent: int, received: int, hosts: int) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return self._exchange.seconds(sent, received)

    def front(self, tokens: int) -> float:
        """See `CostModel`."""
        return tokens * self._front_token_s

    def request(self, prompt: int) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return 0.0

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _attend(self, kv_positions: int, kv_rows: int) -> float:
        config, kernels = self._config, self._kernels
        peak = self._peak(self._router, "fp16")
        if self._expanded:
            per_position = 2.0 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
            return kv_positions * per_position / (peak * kernels.expanded_arithmetic.value)
        per_position = 2.0 * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
        row = self._sizes.kv_token_bytes / config.num_hidden_layers
        # Their authors give both figures for kernels that are bound by one of them.
        return max(
            kv_rows * row / (memory_peak(self._router) * kernels.attention_memory.value),
            kv_positions * per_position / (peak * kernels.attention_arithmetic.value),
        )

    def _mlp(self, weights: int, tokens: int, width: int) -> float:
        hidden = self._config.hidden_size
        moved = tokens * (hidden * (self._item + self._act) + width * (2 * self._act + self._item))
        products = self._product(self._router, weights, tokens, _MLP_PRODUCTS, moved=moved)
        others = self._other(self._router, tokens * (3 * hidden + 3 * width) * self._act, _MLP_KERNELS)
        started = (_MLP_PRODUCTS + _MLP_KERNELS) * self._kernels.start_s.value
        return max(products + others, started) / self._free

    @property
    def _attention_bytes(self) -> int:
        """What kernels that are no products move for one token in a layer's attention and gate."""
        config = self._config
        hidden, heads = config.hidden_size, config.num_attention_heads
        residuals = 2 * 8 * hidden  # twice: two read, two written
        rounded = 2 * 3 * hidden + 3 * heads * config.v_head_dim
        rotated = 4 * heads * config.qk_rope_head_dim
        keys = heads * (2 * config.qk_nope_head_dim + config.qk_rope_head_dim) * 2 if self._expanded else 0
        return residuals + rounded + rotated + keys

    @property
    def _up_parameters(self) -> int:
        config = self._config
        return config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank

    def _product(self, group: NodeGroup, weights: int, rows: int, products: int, *, moved: int) -> float:
        """`products` products of `rows` rows with `weights` bytes of matrices in all, which read and write `moved` bytes more.

        Matrices that are kept in 16 bits beside others in FP8 count twice, as their arithmetic takes twice the time.
        """
        flops = 2.0 * rows * weights / self._item
        return (
            self._bounds(group, weights + moved, flops / self._rate(group)) + products * self._kernels.product_s.value
        )

    def _bounds(self, group: NodeGroup, read: float, computing_s: float) -> float:
        reading_s = read / (memory_peak(group) * self._kernels.memory.value)
        return math.hypot(reading_s, computing_s)

    def _other(self, group: NodeGroup, moved: int, kernels: int) -> float:
        reading_s = moved / (memory_peak(group) * self._kernels.memory.value)
        return reading_s + kernels * self._kernels.other_s.value

    def _rate(self, group: NodeGroup) -> float:
        return self._peak(group, "fp8" if self._item == 1 else "fp16") * self._kernels.arithmetic.value

    @staticmethod
    def _peak(group: NodeGroup, arithmetic: str) -> float:
        return arithmetic_peak(group, arithmetic)
