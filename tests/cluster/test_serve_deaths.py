"""Processes of the cluster are killed while it serves."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from moray.cluster.assembly import checkpoint_path
from moray.cluster.local import LLM
from moray.model.checkpoint import total_bytes
from moray.model.loading import open_model
from moray.model.tensor_names import TensorNames

from .serve_process import KEY, START_S, Serve, eventually, stream_ids

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TOKENS = 400
EXPERTS = 80  # all layers of tiny-r1 together, the MTP layer among them
PROMPT = [100 + i % 200 for i in range(70)]


@pytest.fixture(scope="module")
def undisturbed() -> list[int]:
    """The answer to `PROMPT` where nothing dies; where it is computed makes no difference to it."""
    with LLM("tiny-r1") as llm:
        (answer,) = llm.generate([PROMPT], max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    assert len(answer.token_ids) == TOKENS
    return answer.token_ids


def expert_bytes() -> int:
    """What one expert takes in the checkpoint."""
    config, checkpoint = open_model(checkpoint_path("tiny-r1"), verify="headers", drafts="on")
    tensors = TensorNames(config).routed_experts()
    return total_bytes(entry for t in tensors for entry in checkpoint.locate(t, config).entries) // EXPERTS


def process(serve: Serve, name: str, key: str | None) -> dict[str, Any]:
    found: dict[str, Any] = next(p for p in serve.status(key=key)["processes"] if p["id"] == name)
    return found


def health(client: httpx.Client) -> int:
    return client.get("/health").status_code


@pytest.mark.parametrize("link", ["shm", "gloo"])
def test_a_stream_outlives_an_expert_host(link: str, undisturbed: list[int], request: pytest.FixtureRequest) -> None:
    serve: Serve = request.getfixturevalue(f"{link}_server")
    key = KEY if link == "gloo" else None
    with serve.client(key=key) as client, ThreadPoolExecutor(1) as thread:
        victim = process(serve, "expert-host-1", key)
        seen: list[int] = []
        stream = thread.submit(stream_ids, client, PROMPT, TOKENS, seen)
        eventually(lambda: len(seen) > 10, "the stream has begun")
        os.kill(victim["pid"], signal.SIGKILL)
        killed_at = len(seen)
        eventually(lambda: health(client) == 503, "/health says that experts are missing")
        eventually(lambda: health(client) == 200, "/health says that all is well again")

        assert stream.result(timeout=120) == undisturbed
        assert killed_at < TOKENS, "the host was killed while the stream ran"
    restored = process(serve, "expert-host-1", key)
    assert restored["state"] == "ready"
    assert restored["pid"] != victim["pid"]
    held, rest = divmod(restored["data_bytes_read"] + restored["data_bytes_copied"], expert_bytes())
    hosts = {"shm": 2, "gloo": 3}[link]
    assert rest == 0
    assert EXPERTS // hosts <= held <= -(-EXPERTS // hosts)
    (router,) = serve.status(key=key)["routers"]
    assert router["pages_in_use"] == 0
    assert router["requests_failed"] == 0


def test_a_stream_outlives_a_host_that_hangs_for_a_while(gloo_server: Serve, undisturbed: list[int]) -> None:
    """Silent past the deadline of 4 s it is given up; once it goes on it is linked to again, though it never died."""
    with gloo_server.client(key=KEY) as client, ThreadPoolExecutor(1) as thread:
        victim = process(gloo_server, "expert-host-2", KEY)
        seen: list[int] = []
        stream = thread.submit(stream_ids, client, PROMPT, TOKENS, seen)
        eventually(lambda: len(seen) > 10, "the stream has begun")
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            eventually(lambda: health(client) == 503, "/health says that experts are missing")
        finally:
            os.kill(victim["pid"], signal.SIGCONT)
        eventually(lambda: health(client) == 200, "/health says that all is well again")
        assert stream.result(timeout=120) == undisturbed
    assert process(gloo_server, "expert-host-2", KEY)["pid"] == victim["pid"]


def test_a_router_is_started_again(shm_server: Serve, undisturbed: list[int]) -> None:
    """The stream it had waits for it and goes on where it was."""
    with shm_server.client() as client, ThreadPoolExecutor(1) as thread:
        victim = process(shm_server, "router-0", None)
        seen: list[int] = []
        stream = thread.submit(stream_ids, client, PROMPT, TOKENS, seen)
        eventually(lambda: len(seen) > 10, "the stream has begun")
        os.kill(victim["pid"], signal.SIGKILL)
        killed_at = len(seen)
        eventually(lambda: health(client) == 503, "/health says that no router serves")
        eventually(lambda: health(client) == 200, "/health says that all is well again")

        assert stream.result(timeout=120) == undisturbed
        assert killed_at < TOKENS, "the router was killed while the stream ran"
        assert re.search(r"^moray_requests_resubmitted_total\{[^}]*\} 1\.0$", client.get("/metrics").text, re.MULTILINE)
    restored = process(shm_server, "router-0", None)
    assert restored["state"] == "ready"
    assert restored["pid"] != victim["pid"]


def test_a_controller_is_started_again(gloo_server: Serve, undisturbed: list[int]) -> None:
    """Nothing else ends with it: a stream goes on, and the next one finds every process as it is."""
    with gloo_server.client(key=KEY) as client, ThreadPoolExecutor(1) as thread:
        before = {p["id"]: p["pid"] for p in gloo_server.status(key=KEY)["processes"]}
        old = before.pop("controller")
        seen: list[int] = []
        stream = thread.submit(stream_ids, client, PROMPT, TOKENS, seen)
        eventually(lambda: len(seen) > 10, "the stream has begun")
        os.kill(old, signal.SIGKILL)

        def processes() -> dict[str, int]:
            return {p["id"]: p["pid"] for p in gloo_server.status(key=KEY)["processes"]}

        eventually(lambda: processes().get("controller") not in (None, old), "there is another controller")
        assert health(client) == 200
        assert stream.result(timeout=120) == undisturbed
        eventually(lambda: gloo_server.status(key=KEY)["health"] == "ok", "all is well", within_s=START_S)
        after = processes()
        del after["controller"]
        assert after == before

        def events() -> list[str]:
            return [event["what"] for event in gloo_server.status(key=KEY)["events"]]

        # It has what it took over before it tells of it.
        eventually(lambda: "took_over" in events(), "the new controller tells that it took over")
        assert stream_ids(client, PROMPT, TOKENS, []) == undisturbed
