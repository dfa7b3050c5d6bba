"""Reads byte ranges of safetensors files: exactly those asked for, in parallel, every value checked on the way in.

Plain positional reads into the memory of the tensors: a memory map would read ahead of what a slice needs, would count
nothing and would turn a file truncated under it into a fatal signal.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..configs.errors import CheckpointError
from .progress import Advance, NoProgress, Progress
from .safetensors_file import TensorEntry
from .tensor_names import SCALE_SUFFIX

CHUNK_BYTES = 8 << 20
"""One read: large enough for any file system to stream, small enough to spread one tensor over threads."""

DEFAULT_THREADS = 8
"""Reads in flight: NVMe and network file systems want several; the checks on the data take less time than the reads."""

_CHECK_BYTES = 64 << 10
"""Values are checked in pieces of this size: with their temporaries they stay in a core's cache, and the temporaries
below the size (128 KiB) from which glibc may map and unmap every allocation. One thread then checks 12 GB/s."""

_NONFINITE: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F8_E4M3": (np.uint8, 0x7F),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
}
"""NaN and infinity in the raw bits: these are all set (e4m3 has no infinity, and one NaN of each sign)."""

Buffer: TypeAlias = npt.NDArray[np.uint8]

Check: TypeAlias = Callable[[], None]
"""Called before each chunk, by the threads that read: what it raises ends the read."""


def go_on() -> None:
    """The `Check` that lets every read come to its end."""


@dataclass(frozen=True, slots=True)
class BytesRead:
    """Where a process's weights came from, in bytes of the checkpoint.

    Attributes:
        data: of tensors that were read.
        headers: of headers and index that were read to find them.
        copied: of tensors that were copied from another process instead: what they take in the checkpoint, whatever form
            they were copied in, so that `data + copied` is the size of the process's slices.
    """

    data: int
    headers: int
    copied: int = 0

    def __add__(self, other: BytesRead) -> BytesRead:
        return BytesRead(self.data + other.data, self.headers + other.headers, self.copied + other.copied)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`nbytes` of `entry` from `start` on; `target` is where they go, or None to look at them and let them go."""

    entry: TensorEntry
    start: int
    nbytes: int
    target: Buffer | None


def read_tensors(
    entries: Iterable[TensorEntry],
    *,
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
    description: str = "weights",
    check: Check = go_on,
) -> tuple[dict[str, torch.Tensor], int]:
    """Read whole tensors into CPU memory.

    Args:
        entries: what to read; an entry given twice is read once.
        threads: reads in flight.
        progress: where to show how far it is; nowhere by default.
        description: what the progress calls it.
        check: ends the read by raising.

    Returns:
        (tensor by name, in its stored dtype; bytes read).

    Raises:
        CheckpointError: a file ends early or cannot be read, a value is NaN or infinite, or a scale is negative.
    """
    tensors: dict[str, torch.Tensor] = {}
    chunks: list[_Chunk] = []
    for entry in entries:
        if entry.name in tensors:
            continue
        storage = torch.empty(entry.nbytes, dtype=torch.uint8)
        tensors[entry.name] = storage.view(entry.torch_dtype).view(entry.shape)
        chunks += _split(entry, storage.numpy())
    return tensors, _run(chunks, threads, progress or NoProgress(), description, check)


def scan_tensors(
    entries: Iterable[TensorEntry],
    *,
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
    description: str = "checking weights",
) -> int:
    """Check as `read_tensors` does and keep nothing: memory stays at one chunk a thread. Returns the bytes read."""
    chunks = [chunk for entry in dict.fromkeys(entries) for chunk in _split(entry, None)]
    return _run(chunks, threads, progress or NoProgress(), description, go_on)


def _split(entry: TensorEntry, target: Buffer | None) -> list[_Chunk]:
    """Chunks of whole elements: every supported item size divides `CHUNK_BYTES`."""
    chunks = []
    for start in range(0, entry.nbytes, CHUNK_BYTES):
        nbytes = min(CHUNK_BYTES, entry.nbytes - start)
        chunks.append(_Chunk(entry, start, nbytes, None if target is None else target[start : start + nbytes]))
    return chunks


def _run(chunks: list[_Chunk], threads: int, progress: Progress, description: str, check: Check) -> int:
    # In file order, so that the reads in flight are near each other on disk.
    chunks.sort(key=lambda chunk: (chunk.entry.file, chunk.entry.offset + chunk.start))
    total = sum(chunk.nbytes for chunk in chunks)
    stop = threading.Event()
    scratch = threading.local()

    def work(share: Callable[[], _Chunk | None], files: dict[Path, int], advance: Advance) -> None:
        while not stop.is_set():
            chunk = share()
            if chunk is None:
                return
            check()
            target = chunk.target
            if target is None:
                if not hasattr(scratch, "buffer"):
                    scratch.buffer = np.empty(CHUNK_BYTES, dtype=np.uint8)
                target = scratch.buffer[: chunk.nbytes]
            _read(files[chunk.entry.file], chunk, target)
            _check(chunk, target)
            advance(chunk.nbytes)

    with ExitStack() as stack:
        advance = stack.enter_context(progress.task(description, total))
        files = {file: _open(stack, file) for file in dict.fromkeys(chunk.entry.file for chunk in chunks)}
        share = _shared(chunks)
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="moray-read"))
        workers = [pool.submit(work, share, files, advance) for _ in range(min(threads, len(chunks)))]
        try:
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after an error or Ctrl-C the other threads end with the chunk they are at
        for worker in workers:
            worker.result()
    return total


def _shared(chunks: Sequence[_Chunk]) -> Callable[[], _Chunk | None]:
    """A source of chunks that threads may share: the next one, or None at the end."""
    lock = threading.Lock()
    remaining = iter(chunks)

    def take() -> _Chunk | None:
        with lock:
            return next(remaining, None)

    return take


def _open(stack: ExitStack, file: Path) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error.strerror}); check that it is still there") from error
    stack.callback(os.close, descriptor)
    return descriptor


def _read(descriptor: int, chunk: _Chunk, target: Buffer) -> None:
    """Fill `target`; a positional read may return less than asked for, and returns nothing only at the file's end."""
    entry = chunk.entry
    view = target.data
    done = 0
    while done < chunk.nbytes:
        try:
            count = os.preadv(descriptor, [view[done:]], entry.offset + chunk.start + done)
        except OSError as error:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name}: read failed ({error.strerror}); check the disk or mount"
            ) from error
        if count == 0:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} ends after {chunk.start + done} of {entry.nbytes} bytes: the file "
                "was truncated after it was opened; download it again"
            )
        done += count


def _check(chunk: _Chunk, data: Buffer) -> None:
    """Refuse NaN and infinity, and negative scales; a scale of zero is what an all-zero block may have."""
    dtype, mask = _NONFINITE[chunk.entry.dtype]
    values = data.view(dtype)
    is_scale = chunk.entry.name.endswith(SCALE_SUFFIX) and chunk.entry.dtype == "F32"
    step = _CHECK_BYTES // values.itemsize
    for start in range(0, values.size, step):
        piece = values[start : start + step]
        exponents = piece & dtype(mask)
        if int(exponents.max()) == mask:
            raise _refusal(chunk, start + int(exponents.argmax()), "is NaN or infinite")
        if is_scale and bool((piece.view(np.float32) < 0).any()):
            raise _refusal(chunk, start + int((piece.view(np.float32) < 0).argmax()), "is a negative scale")


def _refusal(chunk: _Chunk, index_in_chunk: int, why: str) -> CheckpointError:
    entry = chunk.entry
    flat = chunk.start // entry.torch_dtype.itemsize + index_in_chunk
    position = [int(index) for index in np.unravel_index(flat, entry.shape)]
    return CheckpointError(
        f"{entry.file}: tensor {entry.name}: element {position} {why}; the file is damaged, download it again"
    )
