"""Brings a checkpoint to this machine: whole, checked, and once, however many processes ask for it at a time."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from ...configs.errors import FetchError
from ...configs.model_url import ModelUrl
from ..progress import Advance, Progress, default_progress
from .directory import WAIT_S, CheckpointDirectory, Entry, Holder, Manifest
from .selection import Parts, metadata_of, weights_of
from .sources import RemoteFile, Source, source_of
from .transfer import Patience, StoppedError, Transfer, digest_of, partial_path

_log = logging.getLogger(__name__)

THREADS = 8
"""Files at once. One connection seldom fills a network card; a file of its own for each keeps the disk's writes in order."""

_SPARE_BYTES = 64 << 20
"""Left free on the disk beyond the files: for the manifest, and for whatever else writes there meanwhile."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint, or its metadata, that is on this machine.

    Attributes:
        path: the directory.
        url: its pinned URL.
        files: how many there are, and `nbytes` what they have.
        transferred: bytes that came over the network now.
        checked: how many files were checked in which way, when they came: by a kind of checksum, or by `size` alone.
        repaired: names of files that were here, were not what they should be, and were fetched again.
    """

    path: Path
    url: ModelUrl
    files: int
    nbytes: int
    transferred: int
    checked: dict[str, int]
    repaired: tuple[str, ...]


def default_weights_dir() -> Path:
    """Where fetched models lie unless a deployment says otherwise: the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "moray" / "models"


def pin(url: ModelUrl) -> ModelUrl:
    """The same with the commit, or the fingerprint, of what is there now; a pinned one as it is, without asking.

    Raises:
        ConfigError, FetchError: there is nothing that can be fetched, or it cannot be reached.
    """
    return url if url.is_pinned else _asked(url).url


def fetch(
    url: ModelUrl,
    weights_dir: Path,
    *,
    to: Path | None = None,
    parts: Parts = "all",
    verify: bool = False,
    progress: Progress | None = None,
    wait_s: float = WAIT_S,
) -> Fetched:
    """Have a checkpoint in a directory of its own below `weights_dir`, or in `to`; what is there already stays.

    A pinned URL whose files are all there, with the size and time they had when they were checked, costs no request.

    Args:
        parts: `metadata` leaves out the safetensors files.
        verify: hash what is there again, whatever was written down.
        progress: by default a bar on a terminal, else a log line now and then.
        wait_s: how long another process that fetches the same may go without getting on.

    Raises:
        ConfigError: what reads such URLs is not installed.
        FetchError: it cannot be had whole: names the file and what to do. What has come stays for the next time.
    """
    started = time.monotonic()
    progress = progress or default_progress()
    source: Source | None = None
    if not url.is_pinned:
        source = _asked(url)
        url = source.url
    directory = CheckpointDirectory(to if to is not None else weights_dir / url.directory())

    def is_here() -> bool:
        return not verify and directory.missing(directory.manifest(), str(url), parts) == []

    if is_here():
        return _fetched(directory, url, parts)
    with directory.held(progress, is_here, wait_s=wait_s) as holder:
        if holder is None:
            return _fetched(directory, url, parts)
        job = _Job(url, directory, holder, progress, source)
        fetched = job.run(parts, verify=verify)
    _log.info(
        "event=fetched url=%s path=%s files=%d bytes=%d transferred=%d duration_s=%.3f",
        url,
        fetched.path,
        fetched.files,
        fetched.nbytes,
        fetched.transferred,
        time.monotonic() - started,
    )
    return fetched


class _Job:
    """One fetch, by whoever holds the directory."""

    def __init__(
        self,
        url: ModelUrl,
        directory: CheckpointDirectory,
        holder: Holder,
        progress: Progress,
        source: Source | None,
    ) -> None:
        self._url = url
        self._directory = directory
        self._holder = holder
        self._progress = progress
        self._source = source
        self._lock = threading.Lock()
        self._transferred = 0
        self._repaired: list[str] = []
        found = directory.manifest()
        if found is not None and found.url != str(url):
            raise FetchError(
                f"{directory.path}: holds {found.url}, not {url}; give another directory, or remove this one"
            )
        self._manifest = found or Manifest(str(url))

    def run(self, parts: Parts, *, verify: bool) -> Fetched:
        if not verify and self._directory.missing(self._manifest, str(self._url), parts) == []:
            return self._result(parts)  # whoever held the directory before has fetched it
        source = self._source or _asked(self._url)
        files = source.files()
        shown = str(source.url.address)
        needed = metadata_of(files, shown)
        self._bring(source, [files[name] for name in needed], "settings", verify=verify)
        self._save(replace(self._manifest, metadata=tuple(needed)))
        if parts == "all":
            needed = [*needed, *weights_of(files, self._directory.path, shown)]
            weights = [files[name] for name in needed if name not in (self._manifest.metadata or ())]
            self._bring(source, weights, "weights", verify=verify)
            self._save(replace(self._manifest, all=tuple(needed)))
            shutil.rmtree(self._directory.partial, ignore_errors=True)  # of contents that are not wanted any more
        return self._result(parts)

    def _bring(self, source: Source, files: Sequence[RemoteFile], what: str, *, verify: bool) -> None:
        here = {file.name for file in files if not verify and self._is_recorded(file)}
        wanted = [file for file in files if file.name not in here]
        if not wanted:
            return
        self._directory.create()
        self._check_space(wanted)
        total = sum(file.size for file in wanted)
        self._holder.begins(total)
        stop = threading.Event()
        with self._progress.task(f"fetching {what} of {source.url.name}", total) as shown:

            def advance(count: int) -> None:
                self._holder.advance(count)
                shown(count)

            transfer = Transfer(source, self._directory, advance, stop)
            try:
                _all_at_once(lambda file: self._one(transfer, file, advance, stop), wanted, stop)
            finally:
                self._transferred += transfer.transferred

    def _one(self, transfer: Transfer, file: RemoteFile, advance: Advance, stop: threading.Event) -> None:
        path = self._directory.path / file.name
        entry = self._as_it_should_be(path, file, advance, stop)
        if entry is None:
            entry = transfer.bring(file)
        with self._lock:
            self._save(self._manifest.with_file(file.name, entry))

    def _as_it_should_be(self, path: Path, file: RemoteFile, advance: Advance, stop: threading.Event) -> Entry | None:
        """A file that is here whole: it was copied here, or was to be checked again; None where it must be fetched."""
        if not path.is_file():
            return None
        mtime_ns, size = path.stat().st_mtime_ns, path.stat().st_size
        found = f"{size} bytes"
        if size == file.size:
            if file.digest is None:
                advance(size)
                return Entry(size, mtime_ns, None)
            found = digest_of(path, file, advance, stop)
            if found == file.digest.value:
                return Entry(size, mtime_ns, file.digest)
            advance(-size)
        _log.warning(
            "event=file_differs file=%s found=%s expected_bytes=%d expected=%s", path, found, file.size, file.digest
        )
        with self._lock:
            self._repaired.append(file.name)
        return None

    def _is_recorded(self, file: RemoteFile) -> bool:
        entry = self._manifest.files.get(file.name)
        return (
            entry is not None
            and (entry.size, entry.digest) == (file.size, file.digest)
            and entry.is_unchanged(self._directory.path / file.name)
        )

    def _check_space(self, wanted: Sequence[RemoteFile]) -> None:
        """Refuse to begin what the disk cannot hold."""
        needed = 0
        for file in wanted:
            path, part = self._directory.path / file.name, partial_path(self._directory, file)
            there = next((p.stat().st_size for p in (path, part) if p.is_file() and p.stat().st_size <= file.size), 0)
            needed += file.size - there
        free = shutil.disk_usage(self._directory.path).free
        if needed and needed + _SPARE_BYTES > free:
            raise FetchError(
                f"{self._directory.path} on {os.uname().nodename}: {needed} bytes ({needed / 1e9:.1f} GB) are still to come, "
                f"and {free} ({free / 1e9:.1f} GB) are free; free some, or give a directory on another disk with "
                "weights_dir or --to"
            )

    def _save(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._directory.write(manifest)

    def _result(self, parts: Parts) -> Fetched:
        fetched = _fetched(self._directory, self._url, parts)
        return replace(fetched, transferred=self._transferred, repaired=tuple(sorted(self._repaired)))


def _all_at_once(function: Callable[[RemoteFile], None], files: Sequence[RemoteFile], stop: threading.Event) -> None:
    """Call `function` with each; where one fails, the others stop, and its error is raised."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="moray-fetch") as pool:
        calls: list[Future[None]] = [pool.submit(function, file) for file in files]
        try:
            wait(calls, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for call in calls:
                call.cancel()
    errors = [error for call in calls if not call.cancelled() and (error := call.exception()) is not None]
    for error in errors:
        if not isinstance(error, StoppedError):
            raise error


def _asked(url: ModelUrl) -> Source:
    """The source, asked again where it did not answer."""
    return Patience(threading.Event()).asking(lambda: source_of(url), str(url))


def _fetched(directory: CheckpointDirectory, url: ModelUrl, parts: Parts) -> Fetched:
    manifest = directory.manifest()
    assert manifest is not None, directory.path
    names = manifest.metadata if parts == "metadata" else manifest.all
    assert names is not None, "it is complete"
    entries = [manifest.files[name] for name in names]
    checked: Counter[str] = Counter("size" if entry.digest is None else entry.digest.kind for entry in entries)
    return Fetched(
        directory.path,
        url,
        files=len(entries),
        nbytes=sum(entry.size for entry in entries),
        transferred=0,
        checked=dict(checked),
        repaired=(),
    )
