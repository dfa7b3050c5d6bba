"""A published checkpoint: which file holds which tensor, and whether that is what the model needs.

Only headers are read here, so opening and validating 689 GB takes about a second. The data is read by `reader`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..configs.errors import CheckpointError
from ..kernels.fp8 import scale_shape
from .config import ModelConfig
from .file_names import INDEX_FILE, SINGLE_FILE
from .safetensors_file import PLAIN_DTYPES, FileHeader, TensorEntry, read_header
from .tensor_names import ExpectedTensor, Role, TensorNames

_HEADER_THREADS = 16
"""Headers are many small reads; on a network file system their latencies should overlap."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where an expected tensor lies: its own bytes and, when it is stored in FP8, its block scales."""

    weight: TensorEntry
    scale_inv: TensorEntry | None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What has to be read for it."""
        return (self.weight,) if self.scale_inv is None else (self.weight, self.scale_inv)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a checkpoint directory by name.

    Attributes:
        path: the directory.
        tensors: where each tensor lies.
        header_bytes: read to open it, the index included.
    """

    path: Path
    tensors: dict[str, TensorEntry]
    header_bytes: int

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the index, if there is one, and the header of each file.

        `model.safetensors` is taken before the index where both exist, as Hugging Face does.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or the index and the files disagree.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory; give a directory with config.json and safetensors files")
        if (path / SINGLE_FILE).exists():
            header = read_header(path / SINGLE_FILE)
            return cls(path, header.entries, header.header_bytes)
        index = path / INDEX_FILE
        if not index.exists():
            raise CheckpointError(_no_weights(path))
        weight_map, index_bytes = _read_index(index)
        headers = _read_shards(path, index, sorted(set(weight_map.values())))
        tensors = {}
        for name, shard in weight_map.items():
            entry = headers[shard].entries.get(name)
            if entry is None:
                raise CheckpointError(
                    f"{path / shard}: tensor {name} is not in it, though {INDEX_FILE} says so; download both again"
                )
            tensors[name] = entry
        return cls(path, tensors, index_bytes + sum(header.header_bytes for header in headers.values()))

    def locate(self, expected: ExpectedTensor, config: ModelConfig) -> StoredTensor:
        """Find one tensor and its scales, and check how they are stored.

        Raises:
            CheckpointError: it is missing, or has a shape, dtype or scales that do not fit.
        """
        entry = self.tensors.get(expected.name)
        if entry is None:
            raise CheckpointError(self._missing(expected))
        if entry.shape != expected.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, but config.json asks for "
                f"{list(expected.shape)}; use the config.json this checkpoint was published with"
            )
        scale = self.tensors.get(expected.scale_name)
        if entry.dtype in PLAIN_DTYPES:
            if scale is not None:
                raise CheckpointError(
                    f"{scale.file}: tensor {scale.name} scales a weight stored as {entry.dtype} in {entry.file}; "
                    "scales belong to F8_E4M3 weights only, so one of the two files is from another checkpoint"
                )
            return StoredTensor(entry, None)
        if entry.dtype != "F8_E4M3" or expected.role is not Role.LINEAR:
            allowed = (*PLAIN_DTYPES, "F8_E4M3") if expected.role is Role.LINEAR else PLAIN_DTYPES
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is stored as {entry.dtype}; a {expected.role.value} may be "
                f"{', '.join(allowed)}; convert it or use the published checkpoint"
            )
        if not config.weights_are_fp8:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is stored as F8_E4M3, but config.json has no quantization_config; "
                "use the config.json this checkpoint was published with"
            )
        return StoredTensor(entry, self._checked_scale(entry, scale, expected.scale_name))

    def validate(self, config: ModelConfig) -> None:
        """Check every tensor the model needs, and warn of those it does not know.

        Raises:
            CheckpointError: as `locate` does, for the first tensor at fault.
        """
        known: set[str] = set()
        names = TensorNames(config)
        for expected in _all_tensors(names):
            known.update(entry.name for entry in self.locate(expected, config).entries)
        unknown = [name for name in self.tensors if name not in known and not names.is_ignored(name)]
        if unknown:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            _log.warning(
                "%s: %d tensors are not part of the model and are not read: %s", self.path, len(unknown), shown
            )

    def model_entries(self, config: ModelConfig) -> list[TensorEntry]:
        """Every tensor the model needs, scales included; those of the MTP layer only where it is served."""
        return [entry for tensor in _all_tensors(TensorNames(config)) for entry in self.locate(tensor, config).entries]

    def _missing(self, expected: ExpectedTensor) -> str:
        scale = self.tensors.get(expected.scale_name)
        clue = "" if scale is None else f" though its scales are in {scale.file.name}"
        return (
            f"{self.path}: tensor {expected.name} {list(expected.shape)} is missing{clue}; download the checkpoint "
            "again, or use the config.json it was published with"
        )

    def _checked_scale(self, entry: TensorEntry, scale: TensorEntry | None, scale_name: str) -> TensorEntry:
        if scale is None:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is stored as F8_E4M3, but its scales {scale_name} are missing; "
                "download the checkpoint again"
            )
        blocks = scale_shape(entry.shape[0], entry.shape[1])
        if scale.shape != blocks or scale.dtype != "F32":
            raise CheckpointError(
                f"{scale.file}: tensor {scale.name} is {scale.dtype} {list(scale.shape)}, but the 128x128 blocks of "
                f"{list(entry.shape)} need F32 {list(blocks)}; other scales are not supported"
            )
        return scale


def _all_tensors(names: TensorNames) -> Iterator[ExpectedTensor]:
    yield from names.dense()
    yield from names.routed_experts()


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes of data of all `entries`."""
    return sum(entry.nbytes for entry in entries)


def listed_tensors(path: Path) -> frozenset[str] | None:
    """Names of the tensors in the index of a checkpoint whose weights need not be there; None where it has no index.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = path / INDEX_FILE
    return frozenset(_read_index(index)[0]) if index.exists() else None


def _read_index(index: Path) -> tuple[dict[str, str], int]:
    """The index's tensor -> file map, and its size in bytes. Its total_size is not relied on: nothing needs it."""
    try:
        text = index.read_bytes()
        weight_map = json.loads(text)["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}); check its permissions and mount") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map ({error!r}); download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty or not an object; download it again")
    for name, shard in weight_map.items():
        # An index comes from the same stranger as the weights: it may name files beside it and nothing else.
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {shard!r}; only safetensors files beside the index are read"
            )
    return weight_map, len(text)


def _read_shards(path: Path, index: Path, shards: Sequence[str]) -> dict[str, FileHeader]:
    missing = [shard for shard in shards if not (path / shard).exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} files named by {index.name} are missing: {shown}; download them"
        )
    with ThreadPoolExecutor(_HEADER_THREADS, thread_name_prefix="moray-headers") as pool:
        return dict(zip(shards, pool.map(read_header, [path / shard for shard in shards]), strict=True))


def _no_weights(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.gguf")):
        return f"{path}: has weights, but not as safetensors; use the published safetensors checkpoint"
    if any(path.glob("*.safetensors")):
        return f"{path}: has safetensors files but neither {SINGLE_FILE} nor {INDEX_FILE}; download the index"
    return f"{path}: has neither {SINGLE_FILE} nor {INDEX_FILE}; give the directory of a published checkpoint"
