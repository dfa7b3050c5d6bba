"""One deployment: which model, spread over how many processes, and how it is served.

The same description comes from a YAML file (`moray serve --config`), from flags, or as the `args` of a stock
`serve deploy` file; see `configs/deployments/`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from .autoscale import Autoscale, Section
from .errors import ConfigError
from .model_url import ModelUrl, is_model_url

EMBEDDED_MODEL = "tiny-r1"
"""Name of the model that ships with the package."""


_NO_LABELS = {
    "CPU": "use the key cpus",
    "GPU": "use the key gpus, of sections that have it",
    "memory": "processes reserve no memory; `moray plan` says what they take",
    "object_store_memory": "Ray carries no tensors here",
}
"""Ray's own resources, and what to do instead of naming them as labels."""

_LEAST_RESOURCE = 1e-4
"""What Ray counts resources in."""


def _check_labels(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if not name or name in _NO_LABELS:
            raise ValueError(f"{name!r} is no resource label: {_NO_LABELS.get(name, 'it must have a name')}")
        if not _LEAST_RESOURCE <= amount < math.inf:
            raise ValueError(
                f"{name} = {amount:g}: must be a number of at least {_LEAST_RESOURCE:g}, which Ray counts in"
            )
    return resources


Resources = Annotated[dict[str, float], AfterValidator(_check_labels)]
"""Custom resources of Ray's that each process reserves besides CPUs and GPUs, such as {moray_expert: 1}. With nodes that
offer them (`ray start --resources`, `resources` of a cluster file's node types) processes come to the nodes meant for them,
and Ray's autoscaler adds nodes of the right kind. A cluster that `moray serve` starts itself offers all that are asked for."""


ON_HEAD = {"node:__internal_head__": 0.001}
"""Reserves nearly nothing of what the node of Ray's head alone offers, one of it, on every cluster."""


CpuInstructions = Literal["auto", "generic", "avx2", "avx512", "avx512_bf16", "amx"]
"""What the native CPU kernels may be told to compute with; after `auto`, each beside all that come before it."""


class ColdHosts(Section):
    """Expert hosts on CPUs, beside those on GPUs, for the experts that least is asked of: the cold tier.

    They compute on the CPU whatever `device` is. Routers ask them only for experts that no other host has. As long as no load
    was measured, nobody knows which experts these should be; `moray rebalance`, or `autoscale.experts`, then brings the right
    ones, and with them the least share of the load that so many slots can have.

    Attributes:
        hosts: how many; their ids are `cold-host-0` and so on.
        max_hosts: as `experts.max_hosts`.
        slots: experts of each layer that each of them holds, and the other hosts need not. None: as many as any other host.
        cpus: logical CPUs that Ray reserves for each.
        threads: compute threads of each. None: `cpus`; but where the native CPU kernels compute and `cpus` is 1, all processes
            of one kind on a node share its cores.
        dtype, fp8: as those of the deployment, for these hosts. `auto` is the deployment's own, as far as that is for CPUs.
            Where these hosts do not compute as the others do, the bits of an answer depend on which experts they hold.
        resources: see `Resources`.
    """

    hosts: int = Field(default=0, ge=0)
    max_hosts: int = Field(default=4, ge=1)
    slots: int | None = Field(default=None, ge=1)
    cpus: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    fp8: Literal["auto", "keep", "decode"] = "auto"
    resources: Resources = Field(default_factory=dict)


class ExpertHosts(Section):
    """The processes that hold the routed experts.

    Attributes:
        hosts: how many; the experts of every layer are spread evenly over them.
        max_hosts: how many `moray scale` can go to on a cluster that `moray serve` starts itself, where Ray is told of CPUs
            for so many; on other clusters the nodes decide.
        min_replicas: copies of each expert, on distinct hosts. With two, the death of a host costs no pause, and twice the
            memory.
        spare_slots: slots of each host and layer beyond its share, for further copies of experts that much is asked of.
        standby: processes kept warm, with everything imported, that become expert hosts (no cold ones) when one is lost or
            added; each reserves what a host does.
        copy_weights: have a host that needs experts take them from hosts that hold them, beside reading the disk:
            whichever is faster gives more.
        cpus: logical CPUs that Ray reserves for each.
        threads: compute threads of each. None: `cpus`; but where the native CPU kernels compute and `cpus` is 1, all processes
            of one kind on a node share its cores.
        gpus: GPUs that Ray reserves for each where `device` is cuda; a fraction lets several share one.
        resources: see `Resources`.
        reply_timeout_s: a host that is silent for so long with work in hand is taken for dead.
        cold: more hosts, on CPUs, for the experts that least is asked of.
    """

    hosts: int = Field(default=2, ge=1)
    max_hosts: int = Field(default=8, ge=1)
    min_replicas: int = Field(default=1, ge=1)
    spare_slots: int = Field(default=0, ge=0)
    standby: int = Field(default=0, ge=0)
    copy_weights: bool = True
    cpus: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    gpus: float = Field(default=1.0, gt=0)
    resources: Resources = Field(default_factory=dict)
    reply_timeout_s: float = Field(default=10.0, gt=0)
    cold: ColdHosts = ColdHosts()


class Routers(Section):
    """The processes that hold everything else and the KV cache.

    Attributes:
        replicas: how many; requests are spread over them.
        max_replicas: how many `moray scale` can go to on a cluster that `moray serve` starts itself, as `experts.max_hosts`.
        cpus: logical CPUs that Ray reserves for each.
        threads: compute threads of each. None: `cpus`; but where the native CPU kernels compute and `cpus` is 1, all processes
            of one kind on a node share its cores.
        gpus: GPUs that Ray reserves for each where `device` is cuda; a fraction lets several share one.
        resources: see `Resources`.
        page_size: positions in one KV page.
        cache_tokens: positions in one router's KV cache, rounded up to whole pages.
        kv_cache: `fp8` keeps latents in FP8 with a scale for every 128 of them: 57% of the memory of bfloat16. `auto` keeps
            them in `dtype`.
        token_budget: most tokens in one step; a longer prompt is computed in chunks.
        max_running: most requests in one step.
        max_waiting: requests beyond this many waiting ones are refused with 429.
        max_wait_s: so are requests that would wait for longer than this before they begin to be computed, and those that have.
            None lets them wait for as long as the queue has room.
        target_itl_s: most time between two tokens of an answer, as far as the router can tell from what steps have taken: it
            computes no more of other prompts beside answers, and gives no more answers at once, than fit. For latency first;
            None is for throughput first, where `token_budget` and `max_running` are the only bounds.
        speculate: whether the MTP layer of the checkpoint drafts tokens, which the next step verifies: several tokens a step,
            the very ones that decoding one by one gives. `on` always drafts, `off` does not read the layer. `auto` reads it
            on CPUs where the checkpoint has one, and drafts while steps show that it pays; on GPUs, where that was not
            measured yet, it is `off`.
        draft_tokens: most tokens drafted for a request and step.
        restore_timeout_s: how long requests wait for lost experts, and those of a lost router for a router, to be restored
            before they fail.
        drain_timeout_s: how long a router that is to leave goes on with its requests; what is left then goes on at another.
    """

    replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    cpus: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    gpus: float = Field(default=1.0, gt=0)
    resources: Resources = Field(default_factory=dict)
    page_size: int = Field(default=32, ge=1)
    cache_tokens: int = Field(default=32768, ge=1)
    kv_cache: Literal["auto", "fp8"] = "auto"
    token_budget: int = Field(default=512, ge=1)
    max_running: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    max_wait_s: float | None = Field(default=30.0, gt=0)
    target_itl_s: float | None = Field(default=None, gt=0)
    speculate: Literal["auto", "off", "on"] = "auto"
    draft_tokens: int = Field(default=1, ge=1, le=3)
    restore_timeout_s: float = Field(default=60.0, gt=0)
    drain_timeout_s: float = Field(default=10.0, ge=0)

    @model_validator(mode="after")
    def _budget_covers_decoding(self) -> Self:
        if self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget = {self.token_budget} is below max_running = {self.max_running}: every running request "
                "needs a token a step; raise the first or lower the second"
            )
        return self


class Supervision(Section):
    """How the controller looks after the processes, and they after it.

    Attributes:
        heartbeat_s: how often every process is asked how it is.
        stuck_after_s: one that has not answered for so long is reported as stuck.
        replace_after_s: and after so long it is ended and restored. Generous: a process that is only slow loses its work.
        lease_s: processes that no controller has spoken to for so long end themselves, so that nothing is left of a cluster
            whose controller was lost for good.
    """

    heartbeat_s: float = Field(default=1.0, gt=0)
    stuck_after_s: float = Field(default=3.0, gt=0)
    replace_after_s: float = Field(default=10.0, gt=0)
    lease_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.heartbeat_s < self.stuck_after_s <= self.replace_after_s < self.lease_s:
            raise ValueError(
                f"heartbeat_s = {self.heartbeat_s}, stuck_after_s = {self.stuck_after_s}, replace_after_s = "
                f"{self.replace_after_s}, lease_s = {self.lease_s}: each must be longer than the one before"
            )
        return self


class Front(Section):
    """The HTTP side. `host` and `port` are for `moray serve`; a Serve file sets its own in `http_options`.

    Attributes:
        replicas: Serve replicas that validate, tokenize and stream.
        resources: see `Resources`. By default they are on the node of Ray's head, which the cluster cannot lose anyway: a
            stream ends with its front. `{}` lets them be on any node.
        api_key_file: file with one bearer key a line; None lets everybody in.
        body_limit_bytes: larger request bodies are refused with 413.
    """

    replicas: int = Field(default=1, ge=1)
    resources: Resources = Field(default_factory=lambda: dict(ON_HEAD))
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key_file: str | None = None
    body_limit_bytes: int = Field(default=8 << 20, ge=1024)


class Deployment(Section):
    """A whole deployment.

    Attributes:
        model: a checkpoint directory, which every node must have, or `tiny-r1` for the embedded one, or where each node is to
            fetch it from: `hf://org/name@revision`, `s3://bucket/prefix`, `gs://...`, `https://...`, or what fsspec knows.
        weights_dir: where fetched models lie, on every node; by default `~/.cache/moray/models`. A local disk, or a file system
            that nodes share: it is fetched once for all that see it.
        name: the id clients use; by default the directory's name.
        device: where experts and attention compute; `auto` is cuda where there is any GPU, else cpu. On a cluster whose nodes
            with GPUs come when they are asked for: cuda.
        dtype: what is computed in; `auto` is bfloat16, on CPUs by kernels of our own. Where those cannot be used (there was no
            compiler when Moray was installed, no AVX2, or `routers.kv_cache` is fp8) CPUs compute in float32, by torch.
        fp8: what becomes of FP8 weights: `keep` leaves them as they are, and multiplies them on GPUs with activations quantised
            to FP8, on CPUs with bfloat16 ones; `decode` turns them into `dtype` when they are loaded. `auto` keeps them, but
            where CPUs compute by torch.
        cpu_instructions: what the native CPU kernels compute with, in every process. `auto` is the best that each machine has.
            Others round elsewhere: where machines differ, answers would depend on which of them computed what, and the lowest
            that all have gives the same bits everywhere. A machine without them is refused.
        link: how routers and expert hosts are joined; `auto` takes shm on one machine, else nccl or gloo.
        max_context: longest prompt plus answer in tokens; by default the model's own, as far as the cache holds it.
        verify: `full` looks for NaN in the whole checkpoint before anything starts, `headers` only at names and shapes,
            `auto` decides by size. What a process reads it checks in any case. Of a model that is fetched, `full` brings all of
            it to the controller's node, and without it nothing is looked at there but its configuration.
    """

    model: str = EMBEDDED_MODEL
    weights_dir: str | None = None
    name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    fp8: Literal["auto", "keep", "decode"] = "auto"
    cpu_instructions: CpuInstructions = "auto"
    link: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    max_context: int | None = Field(default=None, ge=2)
    verify: Literal["auto", "full", "headers"] = "auto"
    experts: ExpertHosts = ExpertHosts()
    routers: Routers = Routers()
    front: Front = Front()
    supervision: Supervision = Supervision()
    autoscale: Autoscale = Autoscale()

    @model_validator(mode="after")
    def _links_reach_cold_hosts(self) -> Self:
        if self.link == "nccl" and self.experts.cold.hosts:
            raise ValueError(
                f"link = 'nccl' and experts.cold.hosts = {self.experts.cold.hosts}: cold hosts have no GPU; use link: auto"
            )
        return self

    @field_validator("model")
    @classmethod
    def _is_fetchable(cls, model: str) -> str:
        if is_model_url(model):
            ModelUrl.parse(model)
        return model

    @model_validator(mode="after")
    def _replicas_find_hosts(self) -> Self:
        scaling, replicas = self.autoscale.experts, self.experts.min_replicas
        if scaling.enabled and scaling.max_hosts + self.experts.cold.hosts < replicas:
            raise ValueError(
                f"autoscale.experts.max_hosts = {scaling.max_hosts} is below experts.min_replicas = {replicas}: copies of "
                "an expert are on distinct hosts; raise the first or lower the second"
            )
        return self

    @property
    def served_name(self) -> str:
        """The id clients use."""
        if self.name is None and is_model_url(self.model):
            return ModelUrl.parse(self.model).name
        return self.name or Path(self.model).expanduser().absolute().name

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "deployment") -> Deployment:
        """Build from plain data; `source` is named in errors.

        Raises:
            ConfigError: a key is unknown or a value cannot be used; names each with the value found.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = [_problem(".".join(str(part) for part in e["loc"]), e) for e in error.errors()]
            raise ConfigError(f"{source}: " + "; ".join(problems)) from None

    @classmethod
    def load(cls, path: Path) -> Deployment:
        """Read a YAML file: the deployment itself, or a stock Serve file with the deployment as its first app's `args`.

        Raises:
            ConfigError: the file cannot be read or does not describe a deployment.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
        if isinstance(raw, dict) and "applications" in raw:
            applications = raw["applications"]
            first = applications[0] if isinstance(applications, list) and applications else None
            raw = first.get("args") if isinstance(first, dict) else None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: must hold a deployment (a mapping), found {type(raw).__name__}")
        return cls.from_dict(raw, source=str(path))


def _problem(where: str, error: ErrorDetails) -> str:
    """One line for one thing that is wrong: which setting, its value, and what it must be."""
    if error["type"] == "extra_forbidden":
        return f"{where}: no such setting"
    if error["type"] == "value_error":  # from a validator above, which names the settings and their values
        return f"{where}: {error['ctx']['error']}".removeprefix(": ")
    return f"{where or 'deployment'} = {error['input']!r}: {error['msg']}"
