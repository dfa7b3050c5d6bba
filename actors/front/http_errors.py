"""OpenAI's error object, and which status each of our errors answers with.

    RequestError             400   invalid_request_error     what to change is in the message
    ContextTooLongError      400   context_length_exceeded
    QueueFullError           429   with Retry-After
    ExpertsUnavailableError  503   with Retry-After: the cluster is restoring the experts
    RouterLostError          503   with Retry-After: the cluster is restoring the routers
    EngineFailedError            500   or 503: the engine gave up on the request
    anything else            500   logged here, without its text in the answer

Once a stream has begun its status is sent, so the same object travels as an SSE event, and no [DONE] follows.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from json.encoder import encode_basestring
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ...configs.errors import ExpertsUnavailableError, QueueFullError, RequestError, RouterLostError

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that hung up before the answer: nobody receives it, metrics and logs show it."""

RESTORE_RETRY_AFTER_S = 5.0
"""How long clients are asked to wait while experts or routers are restored: about what a standby host takes to be linked."""


class ApiError(Exception):
    """An answer that is an error: what any of our exceptions becomes at this border.

    Args:
        status: HTTP status.
        message: for a person; names the value and the way out.
        kind: OpenAI's `type`.
        param: the request field at fault.
        code: machine-readable.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The error as a whole answer."""
        return JsonResponse(self.body, self.status, self.headers)


class EngineFailedError(Exception):
    """The engine gave up on a request after it had begun; the message says why.

    Args:
        message: what went wrong.
        status: 500, or 503 where trying again may help.
    """

    def __init__(self, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class JsonResponse(Response):
    """JSON in one line; not-a-number is a bug and raises."""

    media_type = "application/json"

    def __init__(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(body), status, headers)


def to_json(value: Any) -> str:
    """The one way this package writes JSON."""
    return _without_line_breaks(_ENCODER.encode(value))


def text_to_json(text: str) -> str:
    """A text as `to_json` writes it, for every token of every stream: the encoder's own way to it costs ten times as much."""
    return _without_line_breaks(encode_basestring(text))


def _without_line_breaks(json_text: str) -> str:
    if json_text.isascii():
        return json_text
    return _LINE_BREAKS.sub(lambda match: f"\\u{ord(match[0]):04x}", json_text)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")
"""Clients that cut SSE into lines with Python's `splitlines` would cut at these, so they travel escaped."""


def api_error_of(error: BaseException) -> ApiError:
    """The answer for any exception. Unexpected ones are logged with their traceback and answered without their text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, str(error), kind="rate_limit_error", code=error.code, headers={"Retry-After": seconds})
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, ExpertsUnavailableError | RouterLostError):
        return ApiError(
            503,
            str(error),
            kind="server_error",
            code="router_lost" if isinstance(error, RouterLostError) else "experts_unavailable",
            headers={"Retry-After": str(math.ceil(RESTORE_RETRY_AFTER_S))},
        )
    if isinstance(error, EngineFailedError):
        return ApiError(error.status, str(error), kind="server_error", code="generation_failed")
    logger.error("unexpected error while answering a request", exc_info=error)
    return ApiError(
        500, "the server failed unexpectedly; its log has the details", kind="server_error", code="internal_error"
    )


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app, the framework's own included, with OpenAI's object."""

    async def known(_: Request, error: Exception) -> Response:
        return api_error_of(error).response()

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        messages = {
            404: f"no such endpoint: {method} {path}; see /v1/chat/completions, /v1/completions, /v1/models",
            405: f"{path} does not take {method}; it takes {(error.headers or {}).get('Allow', 'other methods')}",
        }
        code = {404: "unknown_endpoint", 405: "method_not_allowed"}.get(error.status_code)
        message = messages.get(error.status_code) or error.detail or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (ApiError, EngineFailedError, RequestError, ExpertsUnavailableError, RouterLostError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ClientDisconnect, gone)
