"""Hugging Face's hub, through its own library: endpoint, token, proxies and rate limits are that library's affair.

Its downloads are not used: a file that breaks off, it begins anew. What is used is its client and its addresses; the ranges are
asked for here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from ...configs.errors import FetchError
from ...configs.model_url import ModelUrl
from .selection import may_be_needed
from .sources import WORTH_ANOTHER_TRY, Digest, InterruptedTransferError, RemoteFile

_TIMEOUT_S = 60.0
"""Without a byte. What breaks off is asked for again."""

_BLOCK_BYTES = 1 << 20
"""Of the stream, written down at once: as much is lost of it where it breaks off."""


# It logs the address of every request, and those of the hub's stores are signed: whoever has one can read the file.
logging.getLogger("httpx2").setLevel(logging.WARNING)


class HubSource:
    """A model on the hub at one commit; see `Source`.

    Raises:
        FetchError: there is no such model or revision, or it may not be read.
        InterruptedTransferError: the hub did not answer; worth another try.
    """

    def __init__(self, url: ModelUrl) -> None:
        try:
            # `files_metadata` brings size and checksum of every file along: one request for everything.
            found = HfApi().model_info(url.location, revision=url.version, files_metadata=True, timeout=_TIMEOUT_S)
        except (HfHubHTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and _may_pass(error):
                raise InterruptedTransferError(_reason(error)) from error
            raise FetchError(f"{url}: {_reason(error)}") from error
        except httpx2.HTTPError as error:
            raise InterruptedTransferError(_reason(error)) from error
        if found.sha is None:
            raise FetchError(f"{url}: the hub did not say which commit that is; give one, as in {url.address}@COMMIT")
        self.url = url.pinned(found.sha)
        self._files = {}
        for sibling in found.siblings or ():
            if not may_be_needed(sibling.rfilename):
                continue
            if sibling.lfs is not None:
                size, digest = sibling.lfs.size, Digest("sha256", sibling.lfs.sha256.lower())
            elif sibling.size is not None and sibling.blob_id is not None:
                size, digest = sibling.size, Digest("git-sha1", sibling.blob_id.lower())
            else:
                raise FetchError(f"{url}: the hub did not say size and checksum of {sibling.rfilename}; try again")
            self._files[sibling.rfilename] = RemoteFile(sibling.rfilename, size, digest, digest.value)

    def files(self) -> dict[str, RemoteFile]:
        """See `Source`."""
        return dict(self._files)

    @contextmanager
    def reading(self, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """See `Source`."""
        address = hf_hub_url(self.url.location, file.name, revision=self.url.version)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with http_stream_backoff(
                "GET",
                address,
                headers=headers,
                timeout=_TIMEOUT_S,
                retry_on_exceptions=(),  # the caller tries again, from where it got to
                retry_on_status_codes=429,  # with the wait that the hub asks for
            ) as response:
                hf_raise_for_status(response)
                yield start if response.status_code == 206 else 0, response.iter_bytes(_BLOCK_BYTES)
        except HfHubHTTPError as error:
            if not _may_pass(error):
                _refuse(self.url, file, error)
            raise InterruptedTransferError(_reason(error)) from error
        except OfflineModeIsEnabled as error:
            _refuse(self.url, file, error)
        except httpx2.HTTPError as error:
            raise InterruptedTransferError(_reason(error)) from error


def _may_pass(error: HfHubHTTPError) -> bool:
    status = error.response.status_code
    return status >= 500 or status in WORTH_ANOTHER_TRY


def _refuse(url: ModelUrl, file: RemoteFile, error: Exception) -> NoReturn:
    raise FetchError(f"{url}: {file.name} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The hub's own words where it has any, in one line."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or str(error)
        token = "; for a model that is not public, log in with `hf auth login` or set HF_TOKEN"
        return f"HTTP {error.response.status_code}, {' '.join(said.split())}" + (
            token if error.response.status_code in (401, 403, 404) else ""
        )
    return " ".join(f"{type(error).__name__}: {error}".split())
