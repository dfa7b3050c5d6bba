"""What a node can see of a checkpoint: in a directory, or at an address from which it would fetch it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ...configs.errors import ConfigError, FetchError
from ...configs.model_url import ModelUrl, is_model_url
from ...model.file_names import CONFIG_FILE
from .disk import measure_disk
from .facts import DiskFacts, ModelFacts, SpaceFacts
from .space import space_of

_WEIGHTS = ".safetensors"


def model_facts(model: str, weights_dir: str = "") -> ModelFacts:
    """Look at a checkpoint.

    Args:
        model: directory, the embedded model's name, or a URL to fetch it from.
        weights_dir: where fetched models lie on this node; "" for the default.
    """
    return _to_fetch(model, weights_dir) if is_model_url(model) else _in_directory(model)


def _in_directory(model: str) -> ModelFacts:
    from ..assembly import checkpoint_path

    try:
        path = checkpoint_path(model)
        config = (path / CONFIG_FILE).read_bytes()
        weights = sorted(path.glob(f"*{_WEIGHTS}"))
        sizes = [(file.name, file.stat().st_size) for file in weights]
    except ConfigError as error:
        return ModelFacts(model, problem=str(error))
    except OSError as error:
        return ModelFacts(model, problem=f"{error.filename}: {error.strerror}")
    if not weights:
        return ModelFacts(str(path), problem=f"{path}: holds no {_WEIGHTS} file")
    return ModelFacts(
        path=str(path),
        files=len(sizes),
        total_bytes=sum(size for _, size in sizes),
        config_digest=hashlib.sha256(config).hexdigest(),
        listing_digest=_digest(sizes),
        disk=measure_disk(weights),
    )


def _to_fetch(model: str, weights_dir: str) -> ModelFacts:
    """Asks the source what it has; fetches nothing."""
    from ...model.fetching.fetch import default_weights_dir
    from ...model.fetching.sources import InterruptedTransferError, source_of

    try:
        source = source_of(ModelUrl.parse(model))
        listed = source.files()
    except (ConfigError, FetchError, InterruptedTransferError) as error:
        return ModelFacts(model, problem=str(error) or f"{model}: does not answer")
    folder = (Path(weights_dir).expanduser() if weights_dir else default_weights_dir()) / source.url.directory()
    sizes = sorted((file.name, file.size) for file in listed.values() if file.name.endswith(_WEIGHTS))
    here = [folder / name for name, size in sizes if _has(folder / name, size)]
    missing = sum(size for name, size in sizes if folder / name not in here)
    return ModelFacts(
        path=str(source.url),
        files=len(sizes),
        total_bytes=sum(size for _, size in sizes),
        config_digest=source.url.version or "",
        listing_digest=_digest(sizes),
        disk=DiskFacts(problem="it is not on this node yet") if missing else measure_disk(here),
        missing_bytes=missing,
        space=_space(folder) if missing else None,
    )


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _space(folder: Path) -> SpaceFacts | None:
    """Of the disk that the folder will be on."""
    there = next((parent for parent in (folder, *folder.parents) if os.path.isdir(parent)), None)
    return None if there is None else space_of(str(there))


def _digest(sizes: Iterable[tuple[str, int]]) -> str:
    return hashlib.sha256(repr(list(sizes)).encode()).hexdigest()
