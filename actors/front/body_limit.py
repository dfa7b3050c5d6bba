"""A bound on request bodies, held on the bytes that arrive and not only on what a header claims."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_errors import ApiError


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than `limit` bytes, chunked ones included.

    A body whose Content-Length is already too large is refused before any of it is read.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        claimed = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if claimed.isdigit() and int(claimed) > self._limit:
            await self._too_large(f"has {int(claimed)} bytes").response()(scope, receive, send)
            return
        seen = 0

        async def counting_receive() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._limit:
                    # Raised inside the app while it reads the body, and answered by its error handlers.
                    raise self._too_large("goes on after it")
            return message

        await self._app(scope, counting_receive, send)

    def _too_large(self, what: str) -> ApiError:
        return ApiError(
            413,
            f"the request body is limited to {self._limit} bytes and this one {what}; send a shorter prompt, or fewer "
            "prompts per request",
            code="request_too_large",
            # No `Connection: close`: with bytes of the body still under way the client would see a reset, not this.
        )
