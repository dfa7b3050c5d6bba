"""One deployment: which model, spread over how many processes, and how it is served.

The same description comes from a YAML file (`moray serve --config`), from flags, or as the `args` of a stock
`serve deploy` file; see `configs/deployments/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError

EMBEDDED_MODEL = "tiny-r1"
"""Name of the model that ships with the package."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExpertHosts(_Section):
    """The processes that hold the routed experts.

    Attributes:
        hosts: how many; the experts of every layer are spread evenly over them.
        max_hosts: how many `moray scale` can go to on a cluster that `moray serve` starts itself, where Ray is told of CPUs
            for so many; on other clusters the nodes decide.
        min_replicas: copies of each expert, on distinct hosts. With two, the death of a host costs no pause, and twice the
            memory.
        cpus: logical CPUs that Ray reserves for each; also its number of compute threads.
        gpus: GPUs that Ray reserves for each where `device` is cuda; a fraction lets several share one.
        reply_timeout_s: a host that is silent for so long with work in hand is taken for dead.
    """

    hosts: int = Field(default=2, ge=1)
    max_hosts: int = Field(default=8, ge=1)
    min_replicas: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=1.0, gt=0)
    reply_timeout_s: float = Field(default=10.0, gt=0)


class Routers(_Section):
    """The processes that hold everything else and the KV cache.

    Attributes:
        replicas: how many; requests are spread over them.
        cpus: logical CPUs that Ray reserves for each; also its number of compute threads.
        gpus: GPUs that Ray reserves for each where `device` is cuda; a fraction lets several share one.
        page_size: positions in one KV page.
        cache_tokens: positions in one router's KV cache, rounded up to whole pages.
        kv_cache: `fp8` keeps latents in FP8 with a scale for every 128 of them: 57% of the memory of bfloat16. `auto` keeps
            them in `dtype`.
        token_budget: most tokens in one step; a longer prompt is computed in chunks.
        max_running: most requests in one step.
        max_waiting: requests beyond this many waiting ones are refused with 429.
        restore_timeout_s: how long requests wait for lost experts, and those of a lost router for a router, to be restored
            before they fail.
    """

    replicas: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=1.0, gt=0)
    page_size: int = Field(default=32, ge=1)
    cache_tokens: int = Field(default=32768, ge=1)
    kv_cache: Literal["auto", "fp8"] = "auto"
    token_budget: int = Field(default=512, ge=1)
    max_running: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    restore_timeout_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _budget_covers_decoding(self) -> Self:
        if self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget = {self.token_budget} is below max_running = {self.max_running}: every running request "
                "needs a token a step; raise the first or lower the second"
            )
        return self


class Front(_Section):
    """The HTTP side. `host` and `port` are for `moray serve`; a Serve file sets its own in `http_options`.

    Attributes:
        replicas: Serve replicas that validate, tokenize and stream.
        api_key_file: file with one bearer key a line; None lets everybody in.
        body_limit_bytes: larger request bodies are refused with 413.
    """

    replicas: int = Field(default=1, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key_file: str | None = None
    body_limit_bytes: int = Field(default=8 << 20, ge=1024)


class Deployment(_Section):
    """A whole deployment.

    Attributes:
        model: a checkpoint directory, or `tiny-r1` for the embedded one.
        name: the id clients use; by default the directory's name.
        device: where experts and attention compute; `auto` is cuda where there is any GPU, else cpu.
        dtype: what is computed in; `auto` is bfloat16 on GPUs, and float32 on CPUs, whose results do not depend on the
            machine's bf16 units.
        fp8: what becomes of FP8 weights: `keep` multiplies them as they are stored with activations quantised to FP8,
            `decode` turns them into `dtype` when they are loaded; `auto` keeps them on GPUs and decodes them on CPUs.
        link: how routers and expert hosts are joined; `auto` takes shm on one machine, else nccl or gloo.
        max_context: longest prompt plus answer in tokens; by default the model's own, as far as the cache holds it.
        verify: `full` looks for NaN in the whole checkpoint before anything starts, `headers` only at names and shapes,
            `auto` decides by size. What a process reads it checks in any case.
    """

    model: str = EMBEDDED_MODEL
    name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    fp8: Literal["auto", "keep", "decode"] = "auto"
    link: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    max_context: int | None = Field(default=None, ge=2)
    verify: Literal["auto", "full", "headers"] = "auto"
    experts: ExpertHosts = ExpertHosts()
    routers: Routers = Routers()
    front: Front = Front()

    @property
    def served_name(self) -> str:
        """The id clients use."""
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
            problems = [
                f"{'.'.join(str(part) for part in e['loc']) or 'deployment'} = {e['input']!r}: {e['msg']}"
                if e["type"] != "extra_forbidden"
                else f"{'.'.join(str(part) for part in e['loc'])}: no such setting"
                for e in error.errors()
            ]
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
