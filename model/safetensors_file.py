"""The header of one safetensors file, read and checked without touching its data.

A file is an 8-byte little-endian header length, a JSON header, and the data. The header gives each tensor's dtype,
shape and byte range in the data. Parsed here rather than by the `safetensors` package because a slice of a checkpoint
is read by byte range, and because a refusal must say which file is damaged, how, and what to do about it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..configs.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Stored dtypes the model's tensors may have. Other dtypes may occur in a file, in tensors nobody asks for."""

PLAIN_DTYPES = ("F32", "BF16", "F16")

_OTHER_ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

MAX_HEADER_BYTES = 100_000_000
"""The limit the format's own library sets."""

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: in the checkpoint.
        dtype: as the format spells it, for instance "BF16".
        shape: in elements.
        file: that holds it.
        offset: of its first byte from the start of the file.
        nbytes: its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch; only for entries that were checked to have one of `DTYPES`."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one file holds, by name, and how many bytes it took to find out."""

    file: Path
    entries: dict[str, TensorEntry]
    header_bytes: int


def read_header(file: Path) -> FileHeader:
    """Read and check the header of `file`.

    Raises:
        CheckpointError: the file cannot be read, is not safetensors, is truncated or contradicts itself.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if _LFS_POINTER.startswith(start) and len(start) == 8:
                raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
            if size < 8 or size < 8 + min(length, MAX_HEADER_BYTES):
                expected = 8 if size < 8 else 8 + length
                raise CheckpointError(
                    f"{file}: truncated: {size} bytes, but its header alone takes {expected}; download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: not a safetensors file: it claims a header of {length} bytes; the most allowed is "
                    f"{MAX_HEADER_BYTES}"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions and mount") from error
    if len(text) != length:
        raise CheckpointError(f"{file}: truncated while its header was read; download it again")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is a JSON {type(header).__name__}, not an object; download it again")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = {name: _entry(file, name, described, data_start) for name, described in header.items()}
    _check_layout(file, entries, data_start, size)
    return FileHeader(file, entries, data_start)


def _entry(file: Path, name: str, described: Any, data_start: int) -> TensorEntry:
    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name}: {why}; the file is damaged, download it again")

    if not isinstance(described, dict):
        raise refuse(f"described by {described!r}, not by an object")
    dtype, shape, offsets = described.get("dtype"), described.get("shape"), described.get("data_offsets")
    if not isinstance(dtype, str):
        raise refuse(f"dtype is {dtype!r}")
    if not _are_sizes(shape):
        raise refuse(f"shape is {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets are {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    item_size = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_ITEM_SIZES.get(dtype)
    if item_size is not None and nbytes != math.prod(shape) * item_size:
        raise refuse(f"takes {math.prod(shape) * item_size} bytes as {dtype} {shape}, but {nbytes} are set aside")
    return TensorEntry(name, dtype, tuple(shape), file, data_start + offsets[0], nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers of at least 0 (JSON's true and false are not)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(file: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Byte ranges must not overlap and must end where the file does."""
    end = data_start
    last = ""
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < end:
            raise CheckpointError(
                f"{file}: tensors {last} and {entry.name} overlap; the file is damaged, download it again"
            )
        end = entry.offset + entry.nbytes
        last = entry.name
    if size < end:
        raise CheckpointError(
            f"{file}: truncated: {size} bytes where its header promises {end}, the end of tensor {last}; "
            "download it again"
        )
    if size > end:
        raise CheckpointError(
            f"{file}: {size - end} bytes follow the last tensor; the file is damaged, download it again"
        )
