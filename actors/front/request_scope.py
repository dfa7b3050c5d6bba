"""The outermost layer: gives every request an id, counts it, and answers what nothing else has caught."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_errors import CLIENT_CLOSED_REQUEST, api_error_of
from .metrics import FrontMetrics

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestScope:
    """ASGI middleware around all others.

    Args:
        app: what to wrap.
        metrics: counts requests by endpoint and status.
        endpoints: paths that are counted under their own name; all others count as "other", so that clients cannot
            invent series.
        sends_request_id: answer with `x-request-id`: the request's own if it has a plain one, else a new one.
    """

    def __init__(
        self, app: ASGIApp, metrics: FrontMetrics, endpoints: Collection[str], *, sends_request_id: bool
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = frozenset(endpoints)
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sends_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        begin = time.monotonic()
        self._metrics.on_request_start(endpoint)
        try:
            await self._app(scope, receive, noting_send)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED_REQUEST if status is None else status
            raise
        except Exception as error:
            # The last resort of the whole front: logged there, and answered if there is still an answer to give.
            failure = api_error_of(error)
            if status is None:
                await failure.response()(scope, receive, noting_send)
        finally:
            self._metrics.on_request_end(endpoint, status or CLIENT_CLOSED_REQUEST, time.monotonic() - begin)
