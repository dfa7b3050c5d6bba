"""The directory that a checkpoint is fetched into: what is in it and how it was checked, and who is fetching.

All of it is in `.moray-fetch/` beside the checkpoint's files:

    manifest.json   where the files came from, and each one's size, time of change, checksum and how it was checked
    lock            held with `flock` by whoever fetches; the kernel lets go of it when that process ends, however it ends
    holder.json     who holds it, and how far it is
    partial/        files that are not whole yet
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...configs.errors import FetchError
from ..progress import Progress
from .selection import Parts, is_plain_name
from .sources import Digest

_FORMAT = 1

_POLL_S = 0.2
_REPORT_S = 1.0
"""How often the holder writes down how far it is."""

WAIT_S = 600.0
"""How long another process may hold the directory without getting on, before whoever waits for it gives up."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that is whole.

    Attributes:
        size: bytes.
        mtime_ns: when it was last changed. While both are the same, it is taken for what was checked.
        digest: what it hashes to; None where only its size could be checked.
    """

    size: int
    mtime_ns: int
    digest: Digest | None

    def is_unchanged(self, path: Path) -> bool:
        """Whether `path` still has the size and the time."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a directory holds.

    Attributes:
        url: where from; pinned.
        files: those that are whole, by name.
        metadata, all: names that make each part complete; None while that is not so.
    """

    url: str
    files: dict[str, Entry] = field(default_factory=dict)
    metadata: tuple[str, ...] | None = None
    all: tuple[str, ...] | None = None

    def with_file(self, name: str, entry: Entry) -> Manifest:
        """The same with one more file."""
        return replace(self, files={**self.files, name: entry})


@dataclass(frozen=True, slots=True)
class FetchState:
    """How far a fetch on this machine is.

    Attributes:
        holder: who fetches: machine, process and when it began; unique.
        done, total: bytes.
    """

    holder: str
    done: int
    total: int


class CheckpointDirectory:
    """A directory that a checkpoint is fetched into; it need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = path / ".moray-fetch"
        self.partial = self._own / "partial"

    # ---- what is there ------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """What was written down; None for a directory that nothing was fetched into.

        Raises:
            FetchError: it cannot be read.
        """
        path = self._own / "manifest.json"
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r}")
            files = {name: _entry(name, described) for name, described in raw["files"].items()}
            parts = {part: _names(raw[part]) for part in ("metadata", "all")}
            return Manifest(str(raw["url"]), files, **parts)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError(
                f"{path}: cannot be used ({error!r}); remove it, and the files are checked again"
            ) from error

    def write(self, manifest: Manifest) -> None:
        """Write down what is there; whole or not at all."""
        raw = {"format": _FORMAT, **asdict(manifest)}
        _replace(self._own / "manifest.json", json.dumps(raw, indent=1), durable=True)

    def missing(self, manifest: Manifest | None, url: str, parts: Parts) -> list[str] | None:
        """Names that are not there unchanged; None where nobody knows yet which are needed, or what is here is not of `url`."""
        if manifest is None or manifest.url != url:
            return None
        names = manifest.metadata if parts == "metadata" else manifest.all
        if names is None:
            return None
        return [n for n in names if n not in manifest.files or not manifest.files[n].is_unchanged(self.path / n)]

    def create(self) -> None:
        """Make it, if it is not there.

        Raises:
            FetchError: it cannot be made.
        """
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(
                f"{self.path}: cannot be made or written to on {os.uname().nodename} ({error.strerror}); give a directory "
                "that can be, with --to or weights_dir"
            ) from error

    # ---- who fetches --------------------------------------------------------------------------------------------------

    @contextmanager
    def held(
        self, progress: Progress, enough: Callable[[], bool], *, wait_s: float = WAIT_S
    ) -> Iterator[Holder | None]:
        """Hold the directory alone among all processes of this machine; wait for the one that does.

        Args:
            progress: where to show how far the other one is.
            enough: whether that one has brought what this one wants already: then the directory is not held, and None comes.
            wait_s: how long that may go without getting on.

        Raises:
            FetchError: it holds on to it and does not get on.
        """
        self.create()
        descriptor = os.open(self._own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _try_lock(descriptor) and not self._wait(descriptor, progress, enough, wait_s):
                yield None
                return
            holder = Holder(self._own / "holder.json")
            try:
                yield holder
            finally:
                holder.gone()
        finally:
            os.close(descriptor)  # lets go of the lock

    def state(self) -> FetchState | None:
        """How far the fetch that is going on is; None without one."""
        return _read_state(self._own / "holder.json")

    def _wait(self, descriptor: int, progress: Progress, enough: Callable[[], bool], wait_s: float) -> bool:
        """Whether the directory is held in the end, and not only has enough in it."""
        while True:
            state = self.state() or FetchState("another process", 0, 0)
            with progress.task(f"waiting for {state.holder}", state.total) as advance:
                advance(state.done)
                deadline = time.monotonic() + wait_s
                while not _try_lock(descriptor):
                    if enough():
                        return False
                    seen, state = state, self.state() or state
                    if (seen.holder, seen.total) != (state.holder, state.total):
                        break  # another one, or more to do: show it anew
                    if state.done != seen.done:
                        advance(state.done - seen.done)
                        deadline = time.monotonic() + wait_s
                    if time.monotonic() > deadline:
                        raise FetchError(
                            f"{self.path}: {state.holder} holds it and has not got on for {wait_s:.0f} s, with {state.done} "
                            f"of {state.total} bytes done; end that process, and start this again"
                        )
                    time.sleep(_POLL_S)
                else:
                    return True


class Holder:
    """Tells others on this machine who fetches and how far it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = f"process {os.getpid()} on {os.uname().nodename} (since {time.strftime('%H:%M:%S')})"
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._written = 0.0
        self._write()

    def begins(self, total: int) -> None:
        """So many bytes are to come, and none has."""
        with self._lock:
            self._done, self._total = 0, total
            self._write()

    def advance(self, count: int) -> None:
        """So many bytes have come, or must come again, where it is negative. From any thread."""
        with self._lock:
            self._done += count
            if time.monotonic() - self._written >= _REPORT_S:
                self._write()

    def gone(self) -> None:
        """It is over."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk must not end a fetch that has its bytes already
            _replace(self._path, json.dumps(asdict(FetchState(self._name, self._done, self._total))), durable=False)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise FetchError(
            f"the file system of the directory to fetch into cannot lock ({error.strerror}); give another one"
        ) from error
    return True


def _read_state(path: Path) -> FetchState | None:
    try:
        raw = json.loads(path.read_bytes())
        return FetchState(str(raw["holder"]), int(raw["done"]), int(raw["total"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nobody fetches, or is just beginning to


def _entry(name: str, raw: dict[str, Any]) -> Entry:
    if not is_plain_name(name):
        raise ValueError(f"file {name!r}")
    digest = raw["digest"]
    return Entry(int(raw["size"]), int(raw["mtime_ns"]), None if digest is None else Digest(**digest))


def _names(raw: Any) -> tuple[str, ...] | None:
    return None if raw is None else tuple(str(name) for name in raw)


def _replace(path: Path, text: str, *, durable: bool) -> None:
    """Write a file so that whoever reads it finds the old text or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}")
    with beside.open("w", encoding="utf-8") as written:
        written.write(text)
        if durable:
            written.flush()
            os.fsync(written.fileno())
    beside.replace(path)
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have the names in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
