"""How fast a checkpoint's files are read from where they are: not from the page cache, which hides a slow disk."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from .facts import DiskFacts

BLOCK_BYTES = 4 << 20
"""Of one read: what a network file system and an NVMe drive both need to reach their speed."""

READERS = 4
"""Reads at a time, as processes that load at the same time have."""

MAX_BYTES = 1 << 30
"""Enough for a drive of 5 GB/s to be read for a fifth of a second."""

MAX_SECONDS = 2.0

MIN_BYTES = 64 << 20
"""Below this a figure says more about the first read than about the disk."""

_How = Literal["direct", "dropped"]


def measure_disk(
    files: Sequence[Path], *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS, min_bytes: int = MIN_BYTES
) -> DiskFacts:
    """Read blocks spread over all of `files`, at most so many bytes and not much longer than so many seconds.

    Direct reads where the file system has them. Elsewhere each block is dropped from the page cache first; what another
    process has mapped or a file system in memory holds stays there, and is read as fast as loading would read it.
    """
    try:
        blocks = _spread(files, max_bytes // BLOCK_BYTES)
        if len(blocks) * BLOCK_BYTES < min_bytes:
            total = sum(path.stat().st_size for path in files)
            return DiskFacts(problem=f"{total / 1e6:.0f} MB are too little to measure")
        how = _way(blocks[0][0])
        work = iter(blocks)
        lock = threading.Lock()
        start = time.perf_counter()

        def next_block() -> tuple[Path, int] | None:
            with lock:
                return next(work, None) if time.perf_counter() - start < max_seconds else None

        def read() -> int:
            done = 0
            with mmap.mmap(-1, BLOCK_BYTES) as buffer:  # page-aligned, as direct reads need
                while (block := next_block()) is not None:
                    done += _read(*block, buffer, how)
            return done

        with ThreadPoolExecutor(READERS, thread_name_prefix="moray-disk") as readers:
            done = sum(future.result() for future in [readers.submit(read) for _ in range(READERS)])
        return DiskFacts(read_bytes=done, seconds=time.perf_counter() - start, how=how)
    except OSError as error:
        return DiskFacts(problem=f"cannot be read ({error.strerror or error})")


def _spread(files: Sequence[Path], most: int) -> list[tuple[Path, int]]:
    """(file, offset) of up to `most` whole blocks, at even distances."""
    sizes = [(path, path.stat().st_size) for path in files]
    every = [(path, at) for path, size in sizes for at in range(0, size - BLOCK_BYTES + 1, BLOCK_BYTES)]
    if len(every) <= most:
        return every
    return [every[index * len(every) // most] for index in range(most)]


def _way(path: Path) -> _How:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return "dropped"
    return "direct"


def _read(path: Path, offset: int, buffer: mmap.mmap, how: _How) -> int:
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
    try:
        if how == "dropped":
            os.posix_fadvise(fd, offset, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
        return os.preadv(fd, [buffer], offset)
    finally:
        os.close(fd)
