"""What an operator can choose about the front."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ...configs.errors import ConfigError

MAX_PROMPTS = 256
"""Prompts in one /v1/completions request; each takes a place in the queue."""

MAX_STOP_STRINGS = 16
"""Stop strings in one request; each is searched for at every token."""

MAX_STOP_CHARACTERS = 1024
"""Length of one stop string; so much of an answer may be held back while it is looked for."""


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """Settings of one front.

    Attributes:
        body_limit_bytes: larger request bodies are refused with 413. The default holds a prompt of R1's whole
            context, as text or ids, several times over.
        api_keys: bearer keys that are let in; empty lets everybody in. See `load_api_keys`.
        completion_max_tokens: `max_tokens` of /v1/completions where the request has none, as OpenAI's 16; None means
            whatever is left of the context, which is always the default of /v1/chat/completions.
        stall_timeout_s: a request ends with an error when the engine has said nothing about it for so long.
        status_timeout_s: /health, /metrics and /v1/moray/status give up on the cluster's state after this. Routers and
            controller are given less, so that the answer can say which of them does not speak.
        body_timeout_s: a request whose body is not there after this is answered with 408.
        send_timeout_s: a client that takes none of its answer for so long counts as gone.
        keepalive_s: a stream that has been silent so long gets an SSE comment, so that proxies keep it open.
        stream_grace_s: how long a streamed request waits for its first token before its 200 is sent; until then an
            error is still answered with its own status.
        front_id: label of this front's metrics, to tell several replicas apart.
        sends_request_id: answer with `x-request-id`. Off behind Ray Serve's proxy, which does so itself.
    """

    body_limit_bytes: int = 8 << 20
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    completion_max_tokens: int | None = 16
    stall_timeout_s: float = 600.0
    status_timeout_s: float = 2.5
    body_timeout_s: float = 60.0
    send_timeout_s: float = 120.0
    keepalive_s: float = 15.0
    stream_grace_s: float = 5.0
    front_id: str = "front-0"
    sends_request_id: bool = True

    def __post_init__(self) -> None:
        for name in ("body_limit_bytes", *(name for name in self.__slots__ if name.endswith("_s"))):
            if not getattr(self, name) > 0:
                raise ConfigError(f"front setting {name} = {getattr(self, name)!r}: must be above 0")
        if self.completion_max_tokens is not None and self.completion_max_tokens < 1:
            raise ConfigError(
                f"front setting completion_max_tokens = {self.completion_max_tokens!r}: must be at least 1"
            )


def load_api_keys(path: Path) -> tuple[str, ...]:
    """Read a key file: one key a line; empty lines and lines that begin with `#` are skipped.

    Raises:
        ConfigError: the file cannot be read or has no key, or a line cannot be sent as a bearer token. Keys are
            secrets, so errors name lines, not keys.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"key file {path}: cannot be read ({error})") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(
                f"key file {path}, line {number}: a key is printable ASCII without spaces, one a line; got {len(key)} "
                "characters with others among them"
            )
        keys.append(key)
    if not keys:
        raise ConfigError(
            f"key file {path}: has no key; write one a line, or start without a key file to let everybody in"
        )
    return tuple(keys)
