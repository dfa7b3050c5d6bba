"""From a deployment to the plain settings of its processes: what the cluster and local mode have in common."""

from __future__ import annotations

from pathlib import Path

import torch

from ..actors.front.served_model import ServedModel
from ..actors.front.settings import FrontSettings, load_api_keys
from ..actors.router import RouterSettings
from ..configs.deployment import EMBEDDED_MODEL, Deployment
from ..configs.errors import ConfigError
from ..model.compute import Compute
from ..model.config import ModelConfig


def checkpoint_path(model: str) -> Path:
    """The directory behind a deployment's `model`.

    Raises:
        ConfigError: there is no such directory.
    """
    if model == EMBEDDED_MODEL:
        return Path(__file__).resolve().parent.parent / "model" / "tiny_r1"
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model = {model!r}: no such directory; give a checkpoint directory, or {EMBEDDED_MODEL}")
    return path.resolve()


def compute(deployment: Deployment, *, gpus: float) -> Compute:
    """What the deployment's processes compute with, where there are `gpus` GPUs.

    Raises:
        ConfigError: it asks for a GPU, and there is none.
    """
    if deployment.device == "cuda" and not gpus:
        raise ConfigError("device = 'cuda': there is no GPU here; use cpu or auto, or start nodes that have some")
    on_gpu = deployment.device == "cuda" or (deployment.device == "auto" and gpus > 0)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(deployment.dtype)
    return Compute(
        device=torch.device("cuda" if on_gpu else "cpu"),
        dtype=dtype or (torch.bfloat16 if on_gpu else torch.float32),
        keep_fp8=deployment.fp8 == "keep" or (deployment.fp8 == "auto" and on_gpu),
        fp8_kv=deployment.routers.kv_cache == "fp8",
    )


def host_name(index: int) -> str:
    """Id of an expert host."""
    return f"expert-host-{index}"


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


def router_settings(deployment: Deployment, config: ModelConfig) -> RouterSettings:
    """The limits of each router.

    Raises:
        ConfigError: see `max_context`.
    """
    routers = deployment.routers
    return RouterSettings(
        page_size=routers.page_size,
        pages=-(-routers.cache_tokens // routers.page_size),
        max_context=max_context(deployment, config),
        token_budget=routers.token_budget,
        max_running=routers.max_running,
        max_waiting=routers.max_waiting,
        restore_timeout_s=routers.restore_timeout_s,
    )


def served_model(deployment: Deployment, config: ModelConfig) -> ServedModel:
    """What the front knows of the model.

    Raises:
        CheckpointError: tokenizer or generation settings are missing or damaged.
    """
    return ServedModel.load(
        checkpoint_path(deployment.model), name=deployment.served_name, max_context=max_context(deployment, config)
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
        api_keys=keys,
        front_id=front_id,
        sends_request_id=not behind_proxy,
    )
