"""Every exception Moray raises on purpose.

    MorayError
    ├── ConfigError (ValueError)        a setting, flag or deployment file has a value that cannot be used
    ├── CheckpointError (ValueError)    a checkpoint is refused: names the file, the tensor and what to do
    │   └── FetchError                  its files could not be brought to this machine whole
    ├── RequestError (ValueError)       a request cannot be served as asked: what the client can change
    │   ├── ContextTooLongError         prompt (+ max_tokens) does not fit the context
    │   └── QueueFullError              too much is waiting already: try again after `retry_after_s`
    ├── LinkError                       a link between a router and an expert host is unusable from now on
    │   ├── PeerDiedError               the peer's process or socket is gone
    │   ├── PeerTimeoutError            the peer did not answer before the deadline
    │   └── HandshakeError              the peer is not ours: wrong secret, version or role
    ├── ExpertsUnavailableError         some (layer, expert) has no reachable replica
    ├── RouterLostError                 the router of a request is gone or ending; another one could go on with it
    └── ClusterError                    the cluster could not do what was asked of it (start, stop, scale)

Errors a user can cause are `ValueError`s with a message that names the value and the way out; invariants that only the
code can break are `assert`s. The tree lives in the bottom room so that every other room can raise from it.
"""

from __future__ import annotations


class MorayError(Exception):
    """Base of everything below."""


class ConfigError(MorayError, ValueError):
    """A setting, flag or deployment file has a value that cannot be used."""


class CheckpointError(MorayError, ValueError):
    """A checkpoint is refused; the message names the file, the tensor and what to do."""


class FetchError(CheckpointError):
    """A checkpoint's files could not be brought to this machine whole; the message names the file and what to do."""


class RequestError(MorayError, ValueError):
    """A request cannot be served as asked.

    Args:
        message: what is wrong, with the offending value.
        param: the request field at fault, if one is.
        code: a short machine-readable code, as OpenAI's error object has.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLongError(RequestError):
    """The prompt, or the prompt and `max_tokens` together, do not fit the context."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class QueueFullError(RequestError):
    """Too many requests are waiting; `retry_after_s` is the server's estimate of when to come back, in seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class LinkError(MorayError):
    """A link to `peer` is unusable from now on; it must be closed and, if wanted, built anew."""

    def __init__(self, peer: str, message: str) -> None:
        super().__init__(f"link to {peer}: {message}")
        self.peer = peer
        self._message = message

    def __reduce__(self) -> tuple[type[LinkError], tuple[str, str]]:
        # It must cross from one process to another, which the default does with the finished text alone.
        return type(self), (self.peer, self._message)


class PeerDiedError(LinkError):
    """The peer's process or socket is gone."""


class PeerTimeoutError(LinkError):
    """The peer did not answer before the deadline."""


class HandshakeError(LinkError):
    """The peer is not ours: wrong secret, protocol version or role."""


class ExpertsUnavailableError(MorayError):
    """Some (layer, expert) has no reachable replica."""


class RouterLostError(MorayError):
    """The router of a request is gone, or ends as a whole; another one could go on with the request."""


class ClusterError(MorayError):
    """The cluster could not do what was asked of it."""
