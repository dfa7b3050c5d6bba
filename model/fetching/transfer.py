"""One file: from where it broke off to whole, checked and in its place."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ...configs.errors import FetchError
from ..progress import Advance
from .directory import CheckpointDirectory, Entry, sync_directory
from .sources import BLOCK_BYTES, InterruptedTransferError, RemoteFile, Source

if TYPE_CHECKING:
    from hashlib import _Hash

T = TypeVar("T")

_log = logging.getLogger(__name__)

TRIES = 6
"""In a row that bring nothing new, before a transfer is given up: with the waits between them about a minute."""

FIRST_WAIT_S = 1.0
"""Before the second try; twice as long before each further one."""

_COPIES = 2
"""How often a file is fetched whole whose checksum is wrong: a proxy's or a cache's copy may be damaged, the store's is not."""


class StoppedError(Exception):
    """Another file has failed; this one goes on the next time."""


class Patience:
    """Says how often what broke off is tried again.

    Args:
        stop: set, nothing is tried any more.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._failed = 0

    def moved(self) -> None:
        """Something new has come."""
        self._failed = 0

    def wait(self, what: str, error: InterruptedTransferError) -> None:
        """Wait before the next try.

        Raises:
            FetchError: there was the last one.
            StoppedError: `stop` was set.
        """
        self._failed += 1
        if self._failed >= TRIES:
            raise FetchError(
                f"{what}: nothing more came in {TRIES} tries, the last one: {error}; what has come is kept: start it again "
                "when the network is better"
            ) from error
        wait_s = FIRST_WAIT_S * 2 ** (self._failed - 1)
        _log.info(
            "event=transfer_interrupted what=%s tries=%d wait_s=%.1f reason=%s", what, self._failed, wait_s, error
        )
        if self._stop.wait(wait_s):
            raise StoppedError from error

    def asking(self, question: Callable[[], T], what: str) -> T:
        """What `question` answers, tried again where it breaks off."""
        while True:
            try:
                return question()
            except InterruptedTransferError as error:
                self.wait(what, error)


class Transfer:
    """Brings files into a directory; one object for any number of threads.

    Args:
        source: where from.
        directory: where to; held.
        advance: told of every byte that has come, or that must come again, where it is negative.
        stop: set by whoever wants no more.
    """

    def __init__(self, source: Source, directory: CheckpointDirectory, advance: Advance, stop: threading.Event) -> None:
        self._source = source
        self._directory = directory
        self._advance = advance
        self._stop = stop
        self.transferred = 0
        self._lock = threading.Lock()

    def bring(self, file: RemoteFile) -> Entry:
        """Have the file whole, checked and in its place.

        Raises:
            FetchError: it cannot be had, or its checksum is wrong.
            StoppedError: `stop` was set.
        """
        part = partial_path(self._directory, file)
        for copy in range(1, _COPIES + 1):
            found = self._whole(file, part)
            if file.digest is None or found == file.digest.value:
                target = self._directory.path / file.name
                part.replace(target)
                sync_directory(target.parent)
                return Entry(file.size, target.stat().st_mtime_ns, file.digest)
            part.unlink()
            self._advance(-file.size)
            _log.warning(
                "event=checksum_differs file=%s kind=%s expected=%s found=%s copy=%d of=%d",
                file.name,
                file.digest.kind,
                file.digest.value,
                found,
                copy,
                _COPIES,
            )
        assert file.digest is not None
        raise FetchError(
            f"{self._source.url}: {file.name} is damaged where it comes from: its {file.digest.kind} is {found}, and should be "
            f"{file.digest.value}, each of {_COPIES} times; nothing of it was kept. Publish it again, or fetch from elsewhere"
        )

    def _whole(self, file: RemoteFile, part: Path) -> str:
        """Fetch what is missing of the part; what it hashes to, in hexadecimal, once it is whole and on the disk."""
        with part.open("r+b" if part.exists() else "w+b", buffering=0) as written:
            hasher, position = _hashed(file, written, self._advance)
            patience = Patience(self._stop)
            while position < file.size:
                before = position
                try:
                    with self._source.reading(file, position) as (start, blocks):
                        if start != position:
                            self._advance(start - position)
                            hasher, position = _hashed(file, written, self._advance, start)
                        for block in blocks:
                            self._write(file, written, block)
                            hasher.update(block)
                            position += len(block)
                            if position > file.size:
                                raise FetchError(
                                    f"{self._source.url}: {file.name} is longer than the {file.size} bytes it was listed "
                                    "with; it is being written to: fetch it when it is whole"
                                )
                    if position < file.size:
                        raise InterruptedTransferError(f"it ended after {position} of {file.size} bytes")
                except InterruptedTransferError as error:
                    if position > before:
                        patience.moved()
                    patience.wait(f"{self._source.url}: {file.name}", error)
            os.fsync(written.fileno())
        return hasher.hexdigest()

    def _write(self, file: RemoteFile, written: BinaryIO, block: bytes) -> None:
        if self._stop.is_set():
            raise StoppedError
        try:
            view = memoryview(block)
            while view:
                view = view[written.write(view) :]
        except OSError as error:
            full = f"the disk is full: {file.name} has {file.size} bytes; free some space, what has come is kept"
            why = full if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{file.name} cannot be written ({error})"
            raise FetchError(f"{self._directory.path}: {why}") from error
        with self._lock:
            self.transferred += len(block)
        self._advance(len(block))


def partial_path(directory: CheckpointDirectory, file: RemoteFile) -> Path:
    """Where the file grows; another one for each content of it."""
    version = hashlib.sha256(f"{file.size} {file.digest} {file.version}".encode()).hexdigest()[:16]
    return directory.partial / f"{file.name}.{version}"


def digest_of(path: Path, file: RemoteFile, advance: Advance, stop: threading.Event) -> str:
    """What a whole file hashes to by the kind of checksum its source gives, in hexadecimal.

    Raises:
        StoppedError: `stop` was set.
    """
    assert file.digest is not None, file
    hasher = file.digest.hasher(file.size)
    with path.open("rb", buffering=0) as opened:
        while block := opened.read(BLOCK_BYTES):
            if stop.is_set():
                raise StoppedError
            hasher.update(block)
            advance(len(block))
    return hasher.hexdigest()


def _hashed(file: RemoteFile, written: BinaryIO, advance: Advance, length: int | None = None) -> tuple[_Hash, int]:
    """Hash what is there of a part, and stand at its end: the hasher, and bytes.

    Args:
        length: how much of it is to stay; by default all, or nothing of one that is too long.
    """
    there = os.fstat(written.fileno()).st_size
    announced = length is not None
    if length is None:
        length = there if there <= file.size else 0
    written.truncate(length)
    written.seek(0)
    hasher = (file.digest.hasher(file.size)) if file.digest is not None else hashlib.sha256(usedforsecurity=False)
    left = length
    while left:
        block = written.read(min(left, BLOCK_BYTES))
        hasher.update(block)
        left -= len(block)
        if not announced:
            advance(len(block))
    return hasher, length
