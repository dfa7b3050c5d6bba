"""Any single process is frozen while the cluster serves: the others say so within seconds, and no token differs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from moray.cluster.local import LLM
from moray.cluster.run_state import descendants

from .serve_process import Serve, eventually, stream_ids

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TOKENS = 150
STREAMS = 4
REPORT_S = 5.0
"""Within so long after a process was frozen, the others must say which one it is."""

ASK_EVERY_S = 0.2
ASK_TIMEOUT_S = 3.0
"""A question may have gone to a front that is frozen: then others are under way."""


def prompt(stream: int) -> list[int]:
    return [100 + (7 * stream + i) % 200 for i in range(40 + stream)]


@pytest.fixture(scope="module")
def undisturbed() -> list[list[int]]:
    """What each stream must say, computed in this process."""
    with LLM("tiny-r1") as llm:
        answers = llm.generate([prompt(i) for i in range(STREAMS)], max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def serve(serve_factory: Callable[..., Serve], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Two of everything but the controller. Frozen processes are told of, and not replaced: it is them that go on again."""
    config = tmp_path_factory.mktemp("freezes") / "deployment.yaml"
    deployment = {
        "model": "tiny-r1",
        "experts": {"hosts": 2, "min_replicas": 2},
        "routers": {"replicas": 2},
        "front": {"replicas": 2},
        "supervision": {"replace_after_s": 120.0},
    }
    config.write_text(yaml.safe_dump(deployment))
    serve = serve_factory("--config", str(config)).wait_ready()
    yield serve
    serve.take_down()


def stream_on_its_own(serve: Serve, stream: int, started: list[int]) -> list[int]:
    """One stream over a connection of its own."""
    with serve.client() as client:
        return stream_ids(client, prompt(stream), TOKENS, started)


def pids(serve: Serve, name: str) -> list[int]:
    """The processes called so: by its id in the status, or the replicas of a Serve deployment."""
    listed = [p["pid"] for p in serve.status()["processes"] if p["id"] == name]
    marker = f"ServeReplica:moray:{name}".encode()
    below = (found.pid for found in descendants(serve.process.pid))
    return listed or [pid for pid in below if marker in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ask(url: str, path: str) -> dict[str, Any]:
    """What the cluster says there, if it says something in time."""
    try:
        found: dict[str, Any] = httpx.get(f"{url}{path}", timeout=ASK_TIMEOUT_S, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return found


def names(found: dict[str, Any], name: str) -> bool:
    """Whether an answer of /health or /v1/moray/status says of a process that something is wrong with it."""
    if found.get("health", "ok") != "ok" and name in found.get("reason", ""):
        return True
    if any(p["id"] == name and p["state"] != "ready" for p in found.get("processes", ())):
        return True
    return any(name in trouble for r in found.get("routers", ()) for trouble in r["late_hosts"] + r["broken_links"])


def unreported(url: str, name: str) -> str:
    """What was said instead, if nobody names the process within `REPORT_S`; empty if somebody does."""
    deadline = time.monotonic() + REPORT_S
    pending: set[Future[dict[str, Any]]] = set()
    said: list[str] = []
    pool = ThreadPoolExecutor(64, thread_name_prefix="ask")
    try:
        while time.monotonic() < deadline:
            pending |= {pool.submit(ask, url, path) for path in ("/health", "/v1/moray/status")}
            time.sleep(ASK_EVERY_S)
            done = {answer for answer in pending if answer.done()}
            pending -= done
            if any(names(answer.result(), name) for answer in done):
                return ""
            said += [f"{a.result().get('health', 'nothing')} {a.result().get('reason', '')}".strip() for a in done]
        return f"{dict(Counter(said))}, {len(pending)} questions not answered"
    finally:
        pool.shutdown(wait=True)  # each question ends by its own timeout


@pytest.mark.parametrize(
    ("process", "called"),
    [("expert-host-1", "expert-host-1"), ("router-0", "router-0"), ("controller", "controller"), ("front", "front-")],
)
def test_a_frozen_process_is_reported(process: str, called: str, serve: Serve, undisturbed: list[list[int]]) -> None:
    before = pids(serve, process)
    seen: list[list[int]] = [[] for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream_on_its_own, serve, i, seen[i]) for i in range(STREAMS)]
        try:
            eventually(lambda: all(len(tokens) > 5 for tokens in seen), "every stream has begun")
            with frozen(before[0]):
                said = unreported(serve.url, called)
                assert not said, f"nobody has named {process} within {REPORT_S:.0f} s: {said}"
            eventually(lambda: ask(serve.url, "/health").get("health") == "ok", "all is well again")
        finally:
            answers = [stream.result(timeout=120) for stream in streams]
    assert answers == undisturbed
    assert pids(serve, process) == before, "the same processes go on"
    for router in serve.status()["routers"]:
        assert (router["pages_in_use"], router["requests_failed"]) == (0, 0)
