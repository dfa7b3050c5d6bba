"""Several processes and one directory: it is fetched once, and whoever is killed leaves what has come."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moray.configs.model_url import ModelUrl
from moray.model.fetching.directory import CheckpointDirectory
from moray.model.fetching.fetch import Fetched, fetch

from .hub_server import COMMIT, METADATA, REPO, SHARDS, UNIT, HubServer, small_model
from .test_fetching import Shown

URL = ModelUrl.parse(f"hf://{REPO}@{COMMIT}")

_FETCH = f"""
import sys
from pathlib import Path
from moray.configs.model_url import ModelUrl
from moray.model.fetching import hub
from moray.model.fetching.fetch import fetch
from moray.model.progress import NoProgress

hub._BLOCK_BYTES = {UNIT // 8}
print(fetch(ModelUrl.parse(sys.argv[1]), Path(sys.argv[2]), progress=NoProgress()).transferred)
"""


@contextmanager
def another_process(hub: HubServer, models: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", _FETCH, str(URL), str(models)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(small_model()).running() as server:
        server.is_the_hub(monkeypatch)
        server.hold.clear()  # the other process stops in the middle of the weights
        yield server


def eventually(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.01)


def in_a_thread(models: Path, shown: Shown) -> tuple[threading.Thread, list[Fetched]]:
    results: list[Fetched] = []
    thread = threading.Thread(target=lambda: results.append(fetch(URL, models, progress=shown)))
    thread.start()
    return thread, results


def test_the_second_process_waits_and_finds_it_complete(hub: HubServer, tmp_path: Path) -> None:
    with another_process(hub, tmp_path) as first:
        assert hub.holding.acquire(timeout=60)
        shown = Shown(f"waiting for process {first.pid} on {os.uname().nodename}")
        second, results = in_a_thread(tmp_path, shown)
        assert shown.seen.wait(20)
        hub.hold.set()
        assert first.communicate(timeout=60)[0].strip() == str(sum(hub.sent.values()))
        second.join(60)
    assert results[0].transferred == 0
    assert all(hub.count("GET", name) == 1 for name in (*METADATA, *SHARDS))


def test_one_that_is_killed_lets_go_and_only_the_rest_is_transferred(hub: HubServer, tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path / URL.directory())

    def halves() -> list[int]:
        parts = [next(iter(directory.partial.glob(f"{name}.*")), None) for name in SHARDS]
        return [0 if part is None else part.stat().st_size for part in parts]

    with another_process(hub, tmp_path) as first:
        eventually(lambda: min(halves()) >= UNIT)
        shown = Shown("waiting for process")
        second, results = in_a_thread(tmp_path, shown)
        assert shown.seen.wait(20)
        first.kill()
        first.wait(60)
        there = halves()
        hub.hold.set()
        second.join(60)
    assert (results[0].path / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert results[0].transferred == sum(len(hub.files[name]) for name in SHARDS) - sum(there)
    assert all(hub.count("GET", name) == 1 for name in METADATA)
    assert all(hub.count("GET", name) == 2 for name in SHARDS)
    assert directory.state() is None
