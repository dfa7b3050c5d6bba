"""Which files of a published checkpoint are needed: settings, tokenizer and safetensors; no images, no other formats."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ...configs.errors import FetchError
from ..file_names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE

Parts = Literal["metadata", "all"]
"""`metadata` is everything but the weights: what a controller and a front need."""

METADATA_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX_FILE,
)

SUMS_FILES = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt")
"""Names of a list of checksums, as `sha256sum` writes it, of which the first that is there is taken."""


def shards_of(index: bytes, source: str) -> list[str]:
    """The safetensors files that an index names, sorted.

    Raises:
        FetchError: it is no index, or names something else than files beside it.
    """
    try:
        named = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FetchError(f"{source}: {INDEX_FILE} is not an index with a weight_map ({error!r})") from error
    # It comes from a stranger: no name may lead out of the directory.
    strange = [name for name in named if not (isinstance(name, str) and is_plain_name(name) and _is_weights(name))]
    if strange:
        raise FetchError(f"{source}: {INDEX_FILE} names {strange[0]!r}; only safetensors files beside it are fetched")
    return sorted(named)


def metadata_of(there: Collection[str], source: str) -> list[str]:
    """Of the names that are there, those of everything but weights.

    Raises:
        FetchError: it is no checkpoint.
    """
    if CONFIG_FILE not in there:
        raise FetchError(f"{source}: has no {CONFIG_FILE}; give the address of a published checkpoint's folder")
    return [name for name in METADATA_FILES if name in there]


def weights_of(there: Collection[str], directory: Path, source: str) -> list[str]:
    """Of the names that are there, those of the weights; the index, if there is one, lies in `directory` already.

    As in `Checkpoint.open`, the single file is taken before the index where both exist.

    Raises:
        FetchError: weights are missing there.
    """
    if SINGLE_FILE in there:
        return [SINGLE_FILE]
    if INDEX_FILE not in there:
        raise FetchError(
            f"{source}: has neither {SINGLE_FILE} nor {INDEX_FILE}; give the address of a checkpoint that was published "
            "as safetensors"
        )
    shards = shards_of((directory / INDEX_FILE).read_bytes(), source)
    missing = [name for name in shards if name not in there]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FetchError(
            f"{source}: {len(missing)} of {len(shards)} files named by {INDEX_FILE} are not there: {shown}"
        )
    return shards


def may_be_needed(name: str) -> bool:
    """Whether a file of this name beside config.json can be part of a checkpoint."""
    return is_plain_name(name) and (name in METADATA_FILES or _is_weights(name))


def is_plain_name(name: str) -> bool:
    """Whether it names a file in the folder itself."""
    return bool(name) and "/" not in name and "\\" not in name and not name.startswith(".")


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")
