"""Bearer keys: who may use the API."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from .http_errors import ApiError

OPEN_PATHS = frozenset({"/health"})
"""Load balancers and orchestrators probe without a key; the answer says no more than whether the cluster is well."""


class BearerAuth:
    """ASGI middleware that answers 401 unless the request carries one of the keys. Everything but /health is behind it,
    /metrics and /v1/moray/status included, since both tell what others do with the server.

    Args:
        app: what to protect.
        keys: the keys that are let in; at least one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        assert keys, "without keys leave the middleware out"
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "no valid API key; send the header 'Authorization: Bearer KEY' with a key this server knows",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = _digest(key.strip())
        # Every key is compared, each in constant time, so that timing tells nothing about any of them.
        admitted = False
        for known in self._digests:
            admitted |= hmac.compare_digest(digest, known)
        return admitted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
