"""Deployments whose operators published their throughput, and what the simulation says of each.

All serve DeepSeek-V3 or R1 with attention data parallel over the GPUs that hold the experts, prompts and answers computed by
clusters of their own, and two micro-batches that hide each other's exchange. What is simulated are these systems, not Moray:
the check is of the engine and of `gpu_costs.py`, with constants (`published_kernels.py`) that were measured kernel by kernel.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from ...actors.placement_table import PlacementTable
from ...actors.router import RouterSettings
from ...model.compute import Compute
from ...model.config import ModelConfig
from ...model.deepseek_v3 import DEEPSEEK_V3_JSON
from ..assembly import host_name, router_name
from ..placement_plan import HostSpec, plan_placement
from ..planning.assumptions import Assumption
from ..planning.gpu_kinds import gpu_kind
from ..planning.nodes import NodeGroup
from ..planning.sizes import model_sizes
from ..synthetic_load import with_noise
from .cluster import Site
from .draws import SAMPLED_LAYERS, Wire
from .engine import Options, popularity, simulate
from .gpu_costs import GpuCosts
from .published_kernels import HOPPER, DeepEp, hopper
from .skew import Skew
from .trace import Closed, Fixed

DEEPSEEK_V3 = ModelConfig.from_dict(DEEPSEEK_V3_JSON, source="DeepSeek-V3")

GPUS_PER_NODE = 8

_PAGE = 64
_MODELLED = 2
"""Ranks that are modelled one by one; each stands for as many others: all have the same to do."""

_STEPS = 12
"""Of decode that are simulated, all alike: only the experts' load differs."""

_PROMPT_STEPS = 4

EVEN = Skew()
REAL = Skew("lognormal", 1.0)

LOAD = Assumption(
    "experts' load where routing is the model's own: lognormal, standard deviation of the logarithm",
    1.0,
    "",
    "TensorRT-LLM (tech blog 4) measured of R1's experts standard deviation / mean = 1.28 and maximum / mean = 11.9; "
    "lognormal with 1.0 has 1.31 and about 11",
)

STALE = Assumption(
    "error of the load that placements are planned for, of each expert",
    0.12,
    "of its load",
    "TensorRT-LLM (tech blog 4): with EPLB a rank's tokens have a standard deviation of 52 in 1024; 32 of it are chance, what "
    "is left is 4% of a rank with 9 experts",
)


@dataclass(frozen=True, slots=True)
class Published:
    """One deployment.

    Attributes:
        name: who, and what.
        stage: "prefill" or "decode".
        gpu: kind; ranks: how many; slots: experts that each holds in a layer, redundant ones included.
        tokens: of a prompt, or in the cache for each request.
        batch: tokens of a rank's step for prefill, requests of a rank for decode.
        skew: of the experts' load.
        guessed: tokens that a request computes in a step of decode: 2 with one guess by multi-token prediction.
        accepted: tokens that a request gains by a step.
        reported: tokens per second and node: of prompts that are computed, or generated.
        source: of all this.
        caveat: why the simulation must not be expected to agree; empty where it should.
    """

    name: str
    stage: Literal["prefill", "decode"]
    gpu: str
    ranks: int
    slots: int
    tokens: int
    batch: int
    skew: Skew
    reported: float
    source: str
    guessed: int = 1
    accepted: float = 1.0
    caveat: str = ""

    @property
    def costs(self) -> GpuCosts:
        """Of its GPUs."""
        sizes = model_sizes(DEEPSEEK_V3, Compute(torch.device("meta"), torch.bfloat16, keep_fp8=True))
        nodes = NodeGroup("node", self.ranks // GPUS_PER_NODE, GPUS_PER_NODE, gpu_kind(self.gpu))
        links = DeepEp(self.ranks, "normal" if self.stage == "prefill" else "low_latency")
        return GpuCosts(
            sizes,
            router=nodes,
            host=nodes,
            kernels=hopper(self.tokens) if self.stage == "prefill" else HOPPER,
            exchange=links,
            overlap=True,
            expanded=self.stage == "prefill",
        )

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """Everything taken for granted."""
        return (*self.costs.assumptions, *((LOAD, STALE) if self.skew == REAL else ()))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A deployment and what the simulation says.

    Attributes:
        simulated: tokens per second and node.
        balance: mean over maximum of the GPUs' (token, expert) pairs in a layer.
    """

    deployment: Published
    simulated: float
    balance: float

    @property
    def ratio(self) -> float:
        """Simulated over reported."""
        return self.simulated / self.deployment.reported


_SGLANG = "SGLang team, lmsys.org/blog/2025-05-05-large-scale-ep"
_PROFILE = f"DeepSeek's profile-data; tokens/s as derived from it by {_SGLANG}"
_OVERVIEW = "DeepSeek, open-infra-index, day 6: DeepSeek-V3/R1 inference system overview"

DEPLOYMENTS: tuple[Published, ...] = (
    Published("DeepSeek profile, prefill", "prefill", "H800", 32, 9, 4096, 16384, EVEN, 62713, _PROFILE),
    Published(
        "DeepSeek profile, decode", "decode", "H800", 128, 2, 4096, 128, EVEN, 18598, _PROFILE, guessed=2, accepted=1.6
    ),
    Published("SGLang, prefill, routing made even", "prefill", "H100", 32, 9, 4096, 16384, EVEN, 59337, _SGLANG),
    Published("SGLang, prefill of 1k", "prefill", "H100", 32, 9, 1024, 16384, REAL, 57674, _SGLANG),
    Published("SGLang, prefill of 2k", "prefill", "H100", 32, 9, 2048, 16384, REAL, 54543, _SGLANG),
    Published("SGLang, prefill of 4k", "prefill", "H100", 32, 9, 4096, 16384, REAL, 50302, _SGLANG),
    Published("SGLang, decode", "decode", "H100", 72, 4, 2000, 256, REAL, 22282, _SGLANG),
    Published(
        "DeepSeek production, decode",
        "decode",
        "H800",
        144,
        2,
        4989,
        88,
        REAL,
        14800,
        f"{_OVERVIEW}; 88 requests a GPU: 14.8k tokens/s of 8 GPUs, 20 to 22 for each request",
        guessed=2,
        accepted=1.8,
    ),
    Published(
        "DeepSeek production, prefill",
        "prefill",
        "H800",
        32,
        9,
        4096,
        16384,
        REAL,
        73700 * (1 - 0.563),
        f"{_OVERVIEW}; 73.7k tokens/s, of which 56.3% were cached",
        caveat="a mean over a day of changing load; the simulation has all it can take",
    ),
    Published(
        "RTP-LLM, prefill",
        "prefill",
        "H800",
        32,
        9,
        4096,
        8192,
        REAL,
        42600,
        "RTP-LLM's report on DeepSeek-V3 (alibaba/rtp-llm): two prompts of 4k a GPU in 1.5 s",
        caveat="its report says that its attention is slower than the kernels taken here",
    ),
)
"""Those that say enough to be simulated. 1.6 and 1.8 tokens a step: SGLang's assumption in deriving the first, and the V3
report's measured acceptance (arXiv:2412.19437, section 5.4.3) for production."""


def compare(deployment: Published, *, seed: int = 0) -> Comparison:
    """Simulate a deployment; the same bits every time."""
    prefill, ranks = deployment.stage == "prefill", deployment.ranks
    if prefill:
        at_once = max(1, deployment.batch // deployment.tokens)
        requests, longest, budget = _PROMPT_STEPS * at_once, deployment.tokens + 1, deployment.batch
        trace = Closed(requests * ranks, Fixed(deployment.tokens), Fixed(1), requests=requests * ranks, seed=seed)
    else:
        requests = deployment.batch * deployment.guessed
        longest = deployment.tokens + _STEPS
        budget = requests * longest  # what comes with its pages counts, though nobody computes it
        trace = Closed(
            requests * ranks,
            Fixed(deployment.tokens),
            Fixed(_STEPS),
            requests=requests * ranks,
            cached=deployment.tokens - 1,
            seed=seed,
        )
    settings = RouterSettings(
        page_size=_PAGE,
        pages=requests * -(-longest // _PAGE),
        max_context=longest,
        token_budget=budget,
        max_running=requests,
        max_waiting=requests,
        restore_timeout_s=60.0,
    )
    options = Options(skew=deployment.skew, seed=seed)
    site = Site(
        config=DEEPSEEK_V3,
        table=_table(ranks, deployment.slots, options),
        routers=tuple(router_name(index) for index in range(_MODELLED)),
        settings=settings,
        costs=deployment.costs,
        wire=_wire(deployment),
        lockstep=True,
        twins=ranks // _MODELLED,
        choice="even",
        gpus=ranks,
        machines=ranks // GPUS_PER_NODE,
    )
    result = simulate(site, trace, options)
    rate = result.prompt_rate if prefill else result.output_rate * deployment.accepted / deployment.guessed
    return Comparison(deployment, rate / site.machines, result.balance)


@lru_cache(maxsize=8)
def _table(ranks: int, slots: int, options: Options) -> PlacementTable:
    """Experts on GPUs, planned as EPLB does it, for the load they will have as well as it is known beforehand."""
    config = DEEPSEEK_V3
    load = popularity(config, options).shares(0)
    if options.skew == REAL:
        load = with_noise(load, STALE.value, seed=options.seed)
    hosts = [HostSpec(host_name(rank), slots, node=f"node-{rank // GPUS_PER_NODE}") for rank in range(ranks)]
    # Planning takes far longer than all the rest, and the engine draws these layers alone: others have the plan of one before.
    layers = len(load)
    drawn = [index * layers // SAMPLED_LAYERS for index in range(SAMPLED_LAYERS)]
    planned = plan_placement(load[drawn], hosts, first_layer=config.first_k_dense_replace, groups=config.n_group).table
    plan_of = [bisect_right(drawn, layer) - 1 for layer in range(layers)]
    held = {host: tuple(of_host[number] for number in plan_of) for host, of_host in planned.slots.items()}
    return replace(planned, slots=held)


def _wire(deployment: Published) -> Wire:
    """Rows in FP8 there and in BF16 back: one for each expert of a token in decode, one for each of its nodes in prefill."""
    hidden, top_k = DEEPSEEK_V3.hidden_size, DEEPSEEK_V3.num_experts_per_tok
    copies = 1.0
    if deployment.stage == "prefill":
        groups, kept, nodes = DEEPSEEK_V3.n_group, DEEPSEEK_V3.topk_group, deployment.ranks // GPUS_PER_NODE
        missed = math.comb(groups - groups // nodes, kept) / math.comb(groups, kept)
        copies = nodes * (1 - missed) / top_k
    return Wire(0.0, hidden * copies, 0.0, 0.0, 2 * hidden * copies, 0.0)
