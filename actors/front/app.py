"""The OpenAI-compatible API as one FastAPI application, the same in local mode and behind Ray Serve.

POST /v1/chat/completions   messages in, reasoning_content and content out
POST /v1/completions        prompts as text or token ids
GET  /v1/models             the one served model; also /v1/models/{name}
GET  /v1/moray/status       the cluster's state, for `moray status`
GET  /metrics               Prometheus text
GET  /health                200 only while every expert is reachable, "degraded" or not; the only one open without a key
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ..engine_client import EngineClient
from .auth import BearerAuth
from .body_limit import BodyLimit
from .chat import ChatFormat, chat_run, new_chat_id
from .completions import CompletionFormat, completion_runs, new_completion_id, prompt_token_ids
from .generation import Generation, Run
from .health import ask_status, describe, is_healthy
from .http_errors import ApiError, JsonResponse, install_error_handlers
from .metrics import FrontMetrics
from .protocol import ChatRequest, CompletionRequest, parse_request
from .request_scope import RequestScope
from .served_model import ServedModel
from .settings import FrontSettings
from .sse import AnswerFormat, GenerationResponse

__all__ = ["create_app"]


def create_app(client: EngineClient, model: ServedModel, settings: FrontSettings | None = None) -> FastAPI:
    """Build the application.

    Args:
        client: the engine. The caller closes it after the application has stopped.
        model: what is served.
        settings: limits, keys and timeouts; None takes the defaults.
    """
    settings = settings or FrontSettings()
    metrics = FrontMetrics(settings.front_id)
    app = FastAPI(title="Moray", openapi_url=None, redirect_slashes=False)
    install_error_handlers(app)
    _add_generation(app, client, model, settings, metrics)
    _add_models(app, model)
    _add_observation(app, client, settings, metrics)
    endpoints = {path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))}
    # The last one added is the outermost: ids and metrics see everything, and nobody's body is read without a key.
    app.add_middleware(BodyLimit, limit=settings.body_limit_bytes)
    if settings.api_keys:
        app.add_middleware(BearerAuth, keys=settings.api_keys)
    app.add_middleware(RequestScope, metrics=metrics, endpoints=endpoints, sends_request_id=settings.sends_request_id)
    return app


def _add_generation(
    app: FastAPI, client: EngineClient, model: ServedModel, settings: FrontSettings, metrics: FrontMetrics
) -> None:
    def respond(runs: list[Run], form: AnswerFormat, *, stream: bool | None) -> Response:
        generation = Generation(client, runs, stall_timeout_s=settings.stall_timeout_s, observer=metrics)
        return GenerationResponse(generation, form, settings, stream=bool(stream))

    async def body_of(http: Request) -> bytes:
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                return await http.body()
        except TimeoutError:
            raise ApiError(
                408,
                f"the request body was not complete after {settings.body_timeout_s:g} s; send it again",
                code="timeout",
            ) from None

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = parse_request(ChatRequest, await body_of(http))
        _check_name(request.model, model)
        # Templates and tokenizers take milliseconds for long prompts; other requests' tokens go on meanwhile.
        prompt = await asyncio.to_thread(model.tokenizer.apply_chat_template, request.messages)
        answer_id = new_chat_id()
        run = chat_run(request, prompt, model, answer_id)
        form = ChatFormat(request, prompt, model, answer_id, int(time.time()))
        return respond([run], form, stream=request.stream)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        request = parse_request(CompletionRequest, await body_of(http))
        _check_name(request.model, model)
        prompts = await asyncio.to_thread(lambda: [prompt_token_ids(prompt, model) for prompt in request.prompt])
        answer_id = new_completion_id()
        runs = completion_runs(request, prompts, model, answer_id, default_max_tokens=settings.completion_max_tokens)
        form = CompletionFormat(request, prompts, model, answer_id, int(time.time()))
        return respond(runs, form, stream=request.stream)


def _add_models(app: FastAPI, model: ServedModel) -> None:
    card: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "moray",
        "max_model_len": model.max_context,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        _check_name(name, model)
        return JsonResponse(card)


def _add_observation(app: FastAPI, client: EngineClient, settings: FrontSettings, metrics: FrontMetrics) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        status = await ask_status(client, timeout_s=settings.status_timeout_s)
        return JsonResponse(describe(status), 200 if is_healthy(status) else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        status = await ask_status(client, timeout_s=settings.status_timeout_s)
        return Response(metrics.exposition(status, resubmitted=client.resubmitted), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/moray/status")
    async def cluster_status() -> Response:
        status = await ask_status(client, timeout_s=settings.status_timeout_s)
        if status is None:
            raise ApiError(503, describe(None)["reason"], kind="server_error", code="status_unavailable")
        return JsonResponse(asdict(status))


def _check_name(name: str, model: ServedModel) -> None:
    if name != model.name:
        raise ApiError(
            404, f"no such model: {name!r}; this server has {model.name!r}", param="model", code="model_not_found"
        )
