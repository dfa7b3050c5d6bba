"""From a deployment to the plain settings of its processes: what the cluster and local mode have in common."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..actors.front.served_model import ServedModel
from ..actors.front.settings import FrontSettings, load_api_keys
from ..actors.placement_table import COLD_HOST, is_cold
from ..configs.deployment import EMBEDDED_MODEL, Deployment, ExpertHosts
from ..configs.errors import ConfigError
from ..configs.model_url import ModelUrl, is_model_url
from ..kernels.cpu.library import Instructions, native
from ..model.config import ModelConfig
from ..model.fetching.directory import CheckpointDirectory
from ..model.fetching.fetch import default_weights_dir, fetch, pin
from ..model.fetching.selection import Parts
from ..model.progress import Progress

# A front takes the rest of this module, and comes up without torch.
if TYPE_CHECKING:
    from ..actors.router import RouterSettings
    from ..model.compute import Compute
    from ..model.loading import Drafts

_TURNED_AWAY_S = 5.0
"""By so much later than its time a request that waits may be turned away: routers look between steps, and two of a whole token
budget took 4 s (mid, two cores of Zen 3)."""


def checkpoint_path(
    model: str, *, weights_dir: str | None = None, parts: Parts = "all", progress: Progress | None = None
) -> Path:
    """The directory behind a deployment's `model` on this node; what of it is missing is fetched, where there is a URL.

    Args:
        weights_dir: of the deployment.
        parts: `metadata` is everything but weights; of a URL alone, for a directory is there or not.
        progress: where to show a fetch; by default a bar on a terminal, else a log line now and then.

    Raises:
        ConfigError: there is no such directory, or nothing that could fetch it.
        FetchError: it cannot be fetched.
    """
    if model == EMBEDDED_MODEL:
        return Path(__file__).resolve().parent.parent / "model" / "tiny_r1"
    if is_model_url(model):
        return fetch(ModelUrl.parse(model), _models(weights_dir), parts=parts, progress=progress).path
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"model = {model!r}: no such directory on {os.uname().nodename}; give a checkpoint directory that every node has, "
            f"a URL to fetch it from, or {EMBEDDED_MODEL}"
        )
    return path.resolve()


def fetched_directory(model: str, weights_dir: str | None) -> CheckpointDirectory | None:
    """Where a model with a pinned URL is, or will be, on this node; None for what is not fetched."""
    if not is_model_url(model):
        return None
    return CheckpointDirectory(_models(weights_dir) / ModelUrl.parse(model).directory())


def pinned(deployment: Deployment) -> Deployment:
    """The same with its model's URL, if it has one, at the commit or fingerprint of now: every node then has the same weights.

    Raises:
        ConfigError, FetchError: there is no such model, or it cannot be reached.
    """
    if not is_model_url(deployment.model):
        return deployment
    return deployment.model_copy(update={"model": str(pin(ModelUrl.parse(deployment.model)))})


def _models(weights_dir: str | None) -> Path:
    return default_weights_dir() if weights_dir is None else Path(weights_dir).expanduser().absolute()


def compute(deployment: Deployment, *, gpus: float) -> Compute:
    """What the deployment's processes compute with, where there are `gpus` GPUs.

    Raises:
        ConfigError: it asks for a GPU, and there is none; or for instructions of native kernels, and torch is to compute.
    """
    if deployment.device == "cuda" and not gpus:
        raise ConfigError("device = 'cuda': there is no GPU here; use cpu or auto, or start nodes that have some")
    import torch

    from ..model.compute import Compute

    on_gpu = deployment.device == "cuda" or (deployment.device == "auto" and gpus > 0)
    if not on_gpu and _natively(deployment, deployment.dtype, fp8_kv=deployment.routers.kv_cache == "fp8"):
        return _native_compute(deployment, deployment.fp8)
    return Compute(
        device=torch.device("cuda" if on_gpu else "cpu"),
        dtype=getattr(torch, _dtype(deployment.dtype, otherwise="bfloat16" if on_gpu else "float32")),
        keep_fp8=deployment.fp8 == "keep" or (deployment.fp8 == "auto" and on_gpu),
        fp8_kv=deployment.routers.kv_cache == "fp8",
    )


def host_compute(deployment: Deployment, host_id: str, *, gpus: float) -> Compute:
    """What this expert host computes with: that of `compute`, but for cold hosts.

    Raises:
        ConfigError: see `compute`.
    """
    others = compute(deployment, gpus=gpus)
    if not is_cold(host_id):
        return others
    import torch

    from ..model.compute import Compute

    cold = deployment.experts.cold
    as_others = others.device.type == "cpu" and others.keep_fp8
    dtype = deployment.dtype if cold.dtype == "auto" else cold.dtype
    fp8 = deployment.fp8 if cold.fp8 == "auto" and others.device.type == "cpu" else cold.fp8
    # Who asks for another dtype here has cold hosts compute in another way, whatever the others do.
    if cold.dtype != "float32" and _natively(deployment, dtype):
        return _native_compute(deployment, fp8)
    return Compute(
        device=torch.device("cpu"),
        dtype=getattr(torch, _dtype(cold.dtype, otherwise=_dtype(deployment.dtype, otherwise="float32"))),
        keep_fp8=cold.fp8 == "keep" or (cold.fp8 == "auto" and as_others),
        fp8_kv=others.fp8_kv,
    )


def _dtype(setting: str, *, otherwise: str) -> str:
    return otherwise if setting == "auto" else setting


def _native_compute(deployment: Deployment, fp8: str) -> Compute:
    from ..model.compute import Compute

    return replace(Compute.native(), keep_fp8=fp8 != "decode", instructions=deployment.cpu_instructions)


def _natively(deployment: Deployment, dtype: str, *, fp8_kv: bool = False) -> bool:
    """Whether CPUs compute with the native kernels: where there are any that are fast here, or `cpu_instructions` names some,
    and neither float32 nor FP8 pages are asked for. A machine that lacks what is named says so when a process starts there.

    Raises:
        ConfigError: it names some, and torch is to compute.
    """
    asked = deployment.cpu_instructions
    if dtype == "float32" or fp8_kv:
        if asked != "auto":
            torchs = "dtype = 'float32'" if dtype == "float32" else "routers.kv_cache = 'fp8'"
            raise ConfigError(
                f"cpu_instructions = {asked!r} and {torchs}: CPUs compute that by torch, which chooses by itself; leave one out"
            )
        return False
    if asked != "auto":
        return True
    library = native()
    return library is not None and library.best > Instructions.GENERIC


def host_name(index: int) -> str:
    """Id of an expert host."""
    return f"expert-host-{index}"


def cold_name(index: int) -> str:
    """Id of an expert host of the cold tier."""
    return f"{COLD_HOST}{index}"


def host_names(experts: ExpertHosts) -> list[str]:
    """Ids of the expert hosts that a deployment starts with, those of the cold tier last."""
    return [host_name(i) for i in range(experts.hosts)] + [cold_name(i) for i in range(experts.cold.hosts)]


def router_name(index: int) -> str:
    """Id of a router."""
    return f"router-{index}"


def max_context(deployment: Deployment, config: ModelConfig) -> int:
    """Longest prompt plus answer in tokens.

    Raises:
        ConfigError: more is asked for than the model was made for, or than one router's cache holds.
    """
    cache = deployment.routers.cache_tokens
    if deployment.max_context is None:
        return min(config.max_position_embeddings, cache)
    if deployment.max_context > config.max_position_embeddings:
        raise ConfigError(
            f"max_context = {deployment.max_context}: the model was made for {config.max_position_embeddings} tokens"
        )
    if deployment.max_context > cache:
        raise ConfigError(
            f"max_context = {deployment.max_context}: the cache of a router holds routers.cache_tokens = {cache}; "
            "raise that or lower max_context"
        )
    return deployment.max_context


def drafts(deployment: Deployment, *, gpus: float) -> Drafts:
    """Whether the MTP layer is to be served, where there are `gpus` GPUs.

    Raises:
        ConfigError: see `compute`.
    """
    speculate = deployment.routers.speculate
    if speculate == "auto" and compute(deployment, gpus=gpus).device.type != "cpu":
        return "off"
    return speculate


def router_settings(deployment: Deployment, config: ModelConfig) -> RouterSettings:
    """The limits of each router.

    Raises:
        ConfigError: see `max_context`.
    """
    from ..actors.router import RouterSettings

    routers = deployment.routers
    return RouterSettings(
        page_size=routers.page_size,
        pages=-(-routers.cache_tokens // routers.page_size),
        max_context=max_context(deployment, config),
        token_budget=routers.token_budget,
        max_running=routers.max_running,
        max_waiting=routers.max_waiting,
        restore_timeout_s=routers.restore_timeout_s,
        target_itl_s=routers.target_itl_s,
        max_wait_s=routers.max_wait_s,
        draft_tokens=routers.draft_tokens if config.draft_layers else 0,
        draft_always=routers.speculate == "on",
        shares_cores=routers.threads is None and routers.cpus == 1,
    )


def served_model(deployment: Deployment, config: ModelConfig) -> ServedModel:
    """What the front knows of the model.

    Raises:
        CheckpointError: tokenizer or generation settings are missing or damaged.
    """
    return ServedModel.load(
        checkpoint_path(deployment.model, weights_dir=deployment.weights_dir, parts="metadata"),
        name=deployment.served_name,
        max_context=max_context(deployment, config),
    )


def front_settings(deployment: Deployment, *, front_id: str, behind_proxy: bool) -> FrontSettings:
    """The front's limits and keys.

    Raises:
        ConfigError: the key file cannot be used.
    """
    front = deployment.front
    keys = () if front.api_key_file is None else load_api_keys(Path(front.api_key_file).expanduser())
    return FrontSettings(
        body_limit_bytes=front.body_limit_bytes,
        # So that one which is turned away after all is answered with its own status.
        stream_grace_s=max(FrontSettings().stream_grace_s, (deployment.routers.max_wait_s or 0.0) + _TURNED_AWAY_S),
        api_keys=keys,
        front_id=front_id,
        sends_request_id=not behind_proxy,
    )
