"""A folder in object storage or on a web server: everything that fsspec reads.

A folder has no versions. What is there when it is first looked at, names, sizes and the store's own marks, makes a fingerprint,
and every node is told it: one that then finds something else refuses it, instead of serving other weights than the rest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import fsspec
from aiohttp import ClientTimeout
from fsspec.registry import known_implementations

from ...configs.errors import ConfigError, FetchError
from ...configs.model_url import ModelUrl
from ..file_names import INDEX_FILE, SINGLE_FILE
from .selection import METADATA_FILES, SUMS_FILES, may_be_needed, shards_of
from .sources import BLOCK_BYTES, WORTH_ANOTHER_TRY, Digest, InterruptedTransferError, RemoteFile

T = TypeVar("T")

_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocols, and the extra of this project that brings what reads them."""

_WEB = ("http", "https")
_WEB_OPTIONS: Final = {
    "client_kwargs": {
        "timeout": ClientTimeout(total=None, sock_connect=30.0, sock_read=60.0),
        "trust_env": True,  # ~/.netrc, and the usual variables for proxies
    }
}

_QUESTIONS = 16
"""About files of a web server, which has no listing, at once."""

_SMALL_BYTES = 64 << 20
"""An index or a list of checksums is smaller: R1's index has 9 MB."""

_ABSENT = (403, 404, 410)
"""Statuses of what is not there. 403 is what S3 says to whoever may read a bucket's objects but not list them."""

_MARKS = ("ETag", "etag", "md5Hash", "generation", "crc32c", "LastModified", "Last-Modified", "mtime", "created")
"""What stores call what changes with a file's content; the first that is there is taken."""

_SUM_LINE = re.compile(r"\\?(?P<sum>[0-9a-fA-F]{64}) [ *](?:\./)?(?P<name>.+)")

_REFUSALS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class ObjectSource:
    """A folder as it is now, or, if `url` has a fingerprint, as it was then; see `Source`.

    Checked are: the checksums of a `SHA256SUMS` in the folder; of Google's storage, its MD5 of each object; of other stores
    sizes alone. S3's ETag is no checksum of an object that was uploaded in parts, as all large ones are.

    Raises:
        ConfigError: what reads such URLs is not installed.
        FetchError: there is no such folder, it may not be read, or it has changed since the fingerprint was made.
        InterruptedTransferError: there was no answer; worth another try.
    """

    def __init__(self, url: ModelUrl) -> None:
        self._asked = url
        self._fs = _file_system(url)
        found = self._on_the_web() if url.scheme in _WEB else self._listed()
        sums = self._sums(found)
        self._files = {
            name: _remote_file(url, name, info, sums.get(name)) for name, info in found.items() if may_be_needed(name)
        }
        fingerprint = _fingerprint(self._files.values())
        if url.version not in (None, fingerprint):
            raise FetchError(
                f"{url.address}: what is there has changed: its fingerprint was {url.version} and is {fingerprint}; serve "
                f"{url.address} anew, and keep what is served in a folder that nobody writes to"
            )
        self.url = url.pinned(fingerprint)

    def files(self) -> dict[str, RemoteFile]:
        """See `Source`."""
        return dict(self._files)

    @contextmanager
    def reading(self, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """See `Source`."""
        start, opened, first = self._ask(lambda: self._opened(file, start), file.name)
        try:
            yield start, self._blocks(file, opened, first)
        finally:
            opened.close()

    def _opened(self, file: RemoteFile, start: int) -> tuple[int, Any, bytes]:
        """From where on the file is given, the open file, and its first block."""
        path = self._path(file.name)
        opened = self._fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")
        try:
            opened.seek(start)
            return start, opened, opened.read(BLOCK_BYTES)
        except ValueError:
            opened.close()
            if start == 0 or self._asked.scheme not in _WEB:
                raise
        except BaseException:
            opened.close()
            raise
        # A web server without ranges gives a file from its beginning or not at all.
        opened = self._fs.open(path, "rb", block_size=0)
        return 0, opened, b""

    def _blocks(self, file: RemoteFile, opened: Any, first: bytes) -> Iterator[bytes]:
        def read() -> bytes:
            block: bytes = opened.read(BLOCK_BYTES)
            return block

        block = first or self._ask(read, file.name)
        while block:
            yield block
            block = self._ask(read, file.name)

    def _listed(self) -> dict[str, dict[str, Any]]:
        """What the store lists, by name."""
        entries = self._ask(lambda: self._fs.ls(self._path(), detail=True), self._asked.location)
        return {str(e["name"]).rstrip("/").rsplit("/", 1)[-1]: e for e in entries if e.get("type") == "file"}

    def _on_the_web(self) -> dict[str, dict[str, Any]]:
        """What a web server has of the names that a checkpoint may have: it need not list anything."""
        found = self._asked_for([*METADATA_FILES, *SUMS_FILES, SINGLE_FILE], absent=_ABSENT)
        if SINGLE_FILE not in found and INDEX_FILE in found:
            index = self._read(INDEX_FILE, found[INDEX_FILE])
            found |= self._asked_for(shards_of(index, self._asked.address), absent=())
        return found

    def _asked_for(self, names: Sequence[str], *, absent: Sequence[int]) -> dict[str, dict[str, Any]]:
        """What the server says of those that are there; `absent` are the statuses that mean that one is not."""

        def ask(name: str) -> dict[str, Any] | None:
            try:
                return dict(self._fs.info(self._path(name)))
            except Exception as error:
                if _status(error) in absent:
                    return None
                raise self._unless_it_may_pass(name, error) from error

        with ThreadPoolExecutor(_QUESTIONS, thread_name_prefix="moray-asks") as pool:
            return {name: info for name, info in zip(names, pool.map(ask, names), strict=True) if info is not None}

    def _sums(self, found: dict[str, dict[str, Any]]) -> dict[str, str]:
        """The SHA-256 of each file that the folder's list of checksums names."""
        listed = next((name for name in SUMS_FILES if name in found), None)
        if listed is None:
            return {}
        text = self._read(listed, found[listed]).decode("utf-8", errors="replace")
        lines = [_SUM_LINE.fullmatch(line.rstrip()) for line in text.splitlines() if line.strip()]
        sums = {line["name"]: line["sum"].lower() for line in lines if line is not None}
        if len(sums) != len(lines):
            raise FetchError(
                f"{self._asked.address}: {listed} is not what `sha256sum *` writes: a line for each file, its checksum "
                "and its name; write it anew or remove it"
            )
        return sums

    def _read(self, name: str, info: dict[str, Any]) -> bytes:
        size = _size(self._asked, name, info)
        if size > _SMALL_BYTES:
            raise FetchError(f"{self._asked.address}: {name} has {size} bytes; no such file is that large")
        content: bytes = self._ask(lambda: self._fs.cat_file(self._path(name)), name)
        return content

    def _ask(self, question: Callable[[], T], what: str) -> T:
        try:
            return question()
        except Exception as error:  # each store's library has exceptions of its own
            raise self._unless_it_may_pass(what, error) from error

    def _unless_it_may_pass(self, what: str, error: Exception) -> FetchError | InterruptedTransferError:
        """What to raise for it: a refusal, or, where it may be otherwise the next time, a call for another try."""
        status = _status(error)
        refused = isinstance(error, _REFUSALS) if status is None else status < 500 and status not in WORTH_ANOTHER_TRY
        if not refused:
            return InterruptedTransferError(_reason(error))
        return FetchError(f"{self._asked.address}: {what} cannot be read: {_reason(error)}")

    def _path(self, name: str = "") -> str:
        return f"{self._asked.address}/{name}" if name else self._asked.address


def _file_system(url: ModelUrl) -> Any:
    known = known_implementations.get(url.scheme)
    if known is None:
        raise ConfigError(f"{url}: nothing reads {url.scheme}:// URLs; use hf, s3, gs, https, or what fsspec knows")
    options = _WEB_OPTIONS if url.scheme in _WEB else {}
    try:
        # Neither this object nor its listings may be some earlier one's: what is there now is asked for.
        return fsspec.filesystem(url.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _EXTRAS.get(url.scheme)
        way_out = f"pip install 'moray-serve[{extra}]'" if extra else str(known.get("err", error))
        raise ConfigError(
            f"{url}: what reads {url.scheme}:// URLs is not installed: {way_out}, on every node"
        ) from error


def _remote_file(url: ModelUrl, name: str, info: dict[str, Any], sha256: str | None) -> RemoteFile:
    digest = Digest("sha256", sha256) if sha256 else None
    if digest is None and url.scheme in ("gs", "gcs") and info.get("md5Hash"):
        digest = Digest("md5", base64.b64decode(info["md5Hash"]).hex())
    mark = digest.value if digest else next((str(info[key]) for key in _MARKS if info.get(key)), "")
    return RemoteFile(name, _size(url, name, info), digest, mark.removeprefix("W/").strip('"'))


def _size(url: ModelUrl, name: str, info: dict[str, Any]) -> int:
    size = info.get("size")
    if not isinstance(size, int):
        raise FetchError(f"{url.address}: the server does not say how long {name} is (Content-Length)")
    return size


def _fingerprint(files: Iterable[RemoteFile]) -> str:
    lines = sorted(f"{file.name}\0{file.size}\0{file.version}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _cause(error: BaseException) -> BaseException:
    """What lies behind it: of the web, fsspec calls everything not found, also when nobody answered."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def _status(error: Exception) -> int | None:
    """The HTTP status behind it; 500 for whatever else went wrong on the way to a web server, None where there is none."""
    cause = _cause(error)
    response = getattr(cause, "response", None)  # of botocore's errors: a dictionary
    if isinstance(response, dict):
        of_s3: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return of_s3
    for name in ("status", "code"):  # of aiohttp's errors, and of gcsfs's
        status = getattr(cause, name, None)
        if isinstance(status, int):
            return status
    return None if cause is error else 500


def _reason(error: Exception) -> str:
    cause = _cause(error)
    return " ".join(f"{type(cause).__name__}: {cause}".split())
