"""Where a model can be fetched from: `hf://org/name@revision`, `s3://bucket/prefix`, `gs://`, `https://`, and the like.

Only the grammar is here; `model/fetching` does what it says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from .errors import ConfigError

HUB = "hf"
"""Scheme of Hugging Face's hub."""

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.+)")
_HUB_PATH = re.compile(r"(?P<location>[\w.-]+/[\w.-]+)(?:@(?P<version>[\w.-]+(?:/[\w.-]+)*))?")
_FINGERPRINT = re.compile(r"(?P<location>.+?)#(?P<version>[0-9a-f]{16})")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_model_url(model: str) -> bool:
    """Whether a deployment's `model` is to be fetched, and not a directory or the embedded model's name."""
    return "://" in model


@dataclass(frozen=True, slots=True)
class ModelUrl:
    """Where a model is fetched from.

    Attributes:
        scheme: `hf` for the hub, else a protocol of fsspec: s3, gs, https, ...
        location: what follows `://`: `org/name`, or a folder in a bucket or on a server, without a slash at its end.
        version: which content: a revision of the hub, or the fingerprint of a folder's listing; None for what is there now.
    """

    scheme: str
    location: str
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelUrl:
        """Read `scheme://location[@revision]`, or `[#fingerprint]` where it is not the hub's.

        Raises:
            ConfigError: it is none.
        """
        found = _URL.fullmatch(text.rstrip("/"))
        if found is None:
            raise ConfigError(f"{text!r} is no model URL; write hf://org/name@revision, s3://bucket/prefix or the like")
        scheme, rest = found["scheme"], found["rest"]
        if scheme == HUB:
            hub = _HUB_PATH.fullmatch(rest)
            if hub is None:
                raise ConfigError(f"{text!r}: a model on the hub is written hf://org/name or hf://org/name@revision")
            url = cls(HUB, hub["location"], hub["version"])
        else:
            pinned = _FINGERPRINT.fullmatch(rest)
            url = (
                cls(scheme, rest) if pinned is None else cls(scheme, pinned["location"].rstrip("/"), pinned["version"])
            )
            _check_web_address(url)
        if {".", ".."} & set(url._parts()):
            raise ConfigError(f"{text!r}: . and .. have no place in a model URL")
        return url

    @property
    def address(self) -> str:
        """It without the version."""
        return f"{self.scheme}://{self.location}"

    @property
    def is_pinned(self) -> bool:
        """Whether it names content that cannot change: a commit, or a folder as it was when it was listed."""
        return self.version is not None and (self.scheme != HUB or _COMMIT.fullmatch(self.version) is not None)

    @property
    def name(self) -> str:
        """Last part of the location: what the model is called."""
        return self._parts()[-1]

    def pinned(self, version: str) -> ModelUrl:
        """The same at this very version."""
        return replace(self, version=version)

    def directory(self) -> Path:
        """Where it belongs below the directory of all models. One for each content, so that no two ever mix."""
        assert self.is_pinned, f"{self} is not pinned"
        assert self.version is not None
        return Path(self.scheme, *(quote(part, safe="") for part in self._parts()), self.version)

    def _parts(self) -> list[str]:
        return [part for part in self.location.split("/") if part]

    def __str__(self) -> str:
        if self.version is None:
            return self.address
        return f"{self.address}{'@' if self.scheme == HUB else '#'}{self.version}"


def _check_web_address(url: ModelUrl) -> None:
    """Names of models are shown to whoever asks: no key may be part of one."""
    if url.scheme not in ("http", "https"):
        return
    if "@" in url.location.split("/")[0] or "?" in url.location or "#" in url.location:
        shown = f"{url.scheme}://{url.location.split('@')[-1].split('?')[0].split('#')[0]}"
        raise ConfigError(
            f"{shown}: a model URL is a plain address, without user, password, query or fragment; put credentials "
            "into ~/.netrc"
        )
