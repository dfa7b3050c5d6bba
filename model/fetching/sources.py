"""What can be fetched from: the interface of the hub and of object storage, and which of them a URL means."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ...configs.model_url import HUB, ModelUrl

if TYPE_CHECKING:
    from hashlib import _Hash

DigestKind = Literal["sha256", "md5", "git-sha1"]

BLOCK_BYTES = 16 << 20
"""Of one range of a store, or of one read of the disk: long enough that a round trip is a small part of it."""


WORTH_ANOTHER_TRY = (408, 425, 429)
"""Refusals of a web server that may pass: too late, too early, too many."""


class InterruptedTransferError(Exception):
    """What was being read broke off, and may well go on when it is asked for again."""


@dataclass(frozen=True, slots=True)
class Digest:
    """A file's checksum: lower-case hexadecimal. `git-sha1` is the id git gives the file's content."""

    kind: DigestKind
    value: str

    def hasher(self, size: int) -> _Hash:
        """What gives this checksum once it was fed the file's `size` bytes."""
        if self.kind == "git-sha1":
            return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        return hashlib.new(self.kind, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as its source lists it.

    Attributes:
        name: beside config.json; there are no folders.
        size: bytes.
        digest: what it must hash to; None where the source cannot say.
        version: changes when the content does, as far as the source can tell.
    """

    name: str
    size: int
    digest: Digest | None
    version: str


class Source(Protocol):
    """A place that has a checkpoint.

    Attributes:
        url: of this very content; what it lists and gives belongs to it.
    """

    url: ModelUrl

    def files(self) -> dict[str, RemoteFile]:
        """Every file of it that a checkpoint may need, by name.

        Raises:
            FetchError: it cannot be listed, or is not what `url` says any more.
            InterruptedTransferError: there was no answer; worth another try.
        """
        ...

    def reading(self, file: RemoteFile, start: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """A file's bytes from `start` on, or from 0 where the source gives no ranges: from where on, and the bytes.

        Raises:
            InterruptedTransferError: worth another try; on entering or while the bytes are read.
            FetchError: not worth one.
        """
        ...


def source_of(url: ModelUrl) -> Source:
    """The place that `url` means, at what it has now or, if the URL is pinned, at that; asks it over the network.

    Raises:
        ConfigError: what reads such URLs is not installed, or there is no such thing.
        FetchError: there is no such model, or it may not be read.
        InterruptedTransferError: there was no answer; worth another try.
    """
    if url.scheme == HUB:
        from .hub import HubSource

        return HubSource(url)
    from .objects import ObjectSource

    return ObjectSource(url)
