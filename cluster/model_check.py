"""Whether a deployment's model can be served, found out before anything is started."""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.deployment import Deployment
from ..configs.model_url import is_model_url
from ..model.checkpoint import listed_tensors, total_bytes
from ..model.config import ModelConfig
from ..model.loading import open_model, with_drafts
from ..model.progress import Progress
from ..model.tensor_names import TensorNames
from .assembly import checkpoint_path, compute, drafts


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model's tensors on disk: what every router reads, and all routed experts."""

    dense: int
    routed: int


def check_model(
    deployment: Deployment, *, gpus: float = 0.0, progress: Progress | None = None
) -> tuple[ModelConfig, WeightBytes]:
    """Open the model as far as this node needs it, and refuse what cannot be served.

    Of a model that is fetched, that is its metadata: weights belong on the nodes that hold them, and each process checks the
    names, shapes and data of those it reads. `verify: full` alone brings all of it here.

    Args:
        gpus: that there are for it.
        progress: where to show a fetch, and a read of everything.

    Returns:
        The configuration, with the MTP layer where it is to be served, and bytes of weights. Of a model that is fetched only an
        index of its files says whether it has that layer.

    Raises:
        ConfigError, CheckpointError: it cannot be served.
    """
    drafting = drafts(deployment, gpus=gpus)
    whole = not is_model_url(deployment.model) or deployment.verify == "full"
    path = checkpoint_path(
        deployment.model,
        weights_dir=deployment.weights_dir,
        parts="all" if whole else "metadata",
        progress=progress,
    )
    if not whole:
        return _from_config(with_drafts(ModelConfig.load(path), drafting, listed_tensors(path)))
    config, checkpoint = open_model(path, verify=deployment.verify, drafts=drafting, progress=progress)
    names = TensorNames(config)
    dense, routed = (
        total_bytes(entry for tensor in tensors for entry in checkpoint.locate(tensor, config).entries)
        for tensors in (names.dense(), names.routed_experts())
    )
    return config, WeightBytes(dense, routed)


def _from_config(config: ModelConfig) -> tuple[ModelConfig, WeightBytes]:
    """Bytes as published checkpoints have them: they are shown, and nothing depends on them."""
    from .planning.sizes import ModelSizes

    sizes = ModelSizes(config, compute(Deployment(device="cpu"), gpus=0))
    experts = len(config.moe_layers) * config.n_routed_experts
    return config, WeightBytes(sizes.disk_dense.total, sizes.disk_expert.total * experts)
