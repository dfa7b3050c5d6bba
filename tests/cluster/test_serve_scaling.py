"""`moray scale` on a running server, while it streams."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from moray.cluster.local import LLM

from .serve_process import Serve, eventually, stream_ids

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TOKENS = 150
STREAMS = 4
SCALE_S = 180.0


def prompt(stream: int) -> list[int]:
    return [100 + (7 * stream + i) % 200 for i in range(40 + stream)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, list[int]]:
    """What each stream must say, computed in this process."""
    with LLM("tiny-r1") as llm:
        answers = llm.generate(
            [prompt(stream) for stream in range(STREAMS)], max_tokens=TOKENS, temperature=0.0, ignore_eos=True
        )
    return dict(enumerate(answer.token_ids for answer in answers))


def scale(serve: Serve, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "moray.cluster.cli", "scale", *arguments],
        env=serve.environment,
        capture_output=True,
        text=True,
        timeout=SCALE_S,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def hosts(serve: Serve) -> list[dict[str, Any]]:
    return [p for p in serve.status()["processes"] if p["role"] == "expert_host"]


def test_streams_go_on_while_hosts_come_and_go(shm_server: Serve, undisturbed: dict[int, list[int]]) -> None:
    stop = threading.Event()
    wrong: list[str] = []
    finished: list[float] = []

    def keep_asking(first: int) -> None:
        with shm_server.client() as client:
            for stream in itertools.islice(itertools.cycle(range(STREAMS)), first, None):
                if stop.is_set():
                    return
                if stream_ids(client, prompt(stream), TOKENS, []) != undisturbed[stream]:
                    wrong.append(f"stream {stream}")
                finished.append(time.monotonic())

    assert len(hosts(shm_server)) == 2
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(keep_asking, first) for first in range(STREAMS)]
        try:
            eventually(lambda: len(finished) >= 1, "a first stream has ended")
            plan = scale(shm_server, "--experts", "4", "--dry-run")
            assert "plan: add expert-host-2, expert-host-3; move " in plan
            assert len(hosts(shm_server)) == 2

            up = scale(shm_server, "--experts", "4")
            assert "done: epoch 2 after" in up
            assert [p["state"] for p in hosts(shm_server)] == ["ready"] * 4
            seen = len(finished)
            eventually(lambda: len(finished) > seen + STREAMS, "streams run on four hosts")

            down = json.loads(scale(shm_server, "--experts", "2", "--json"))
            assert down["removed"] == ["expert-host-2", "expert-host-3"]
            assert shm_server.status()["epoch"] == 3
            seen = len(finished)
            eventually(lambda: len(finished) > seen + STREAMS, "streams run on two hosts again")
        finally:
            stop.set()
        for stream in streams:
            stream.result(timeout=120)
    assert wrong == []
    (router,) = shm_server.status()["routers"]
    assert (router["requests_failed"], router["pages_in_use"]) == (0, 0)
    assert shm_server.status()["health"] == "ok"


def test_more_than_there_is_room_for(shm_server: Serve) -> None:
    assert "at most 16 hosts" in scale(shm_server, "--experts", "17", status=1)
    assert "more CPUs" in scale(shm_server, "--experts", "16", status=1)
    assert len(hosts(shm_server)) == 2
