"""A deployment whose model is fetched: the same tokens, each node for itself, and the controller without weights."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moray import LLM
from moray.actors.placement_table import PlacementTable
from moray.cluster.assembly import checkpoint_path, compute, host_name, pinned
from moray.cluster.cli import main
from moray.cluster.handles import Patience
from moray.cluster.in_touch import InTouch
from moray.cluster.load_progress import FetchedBytes, LoadingShown
from moray.cluster.model_check import check_model
from moray.cluster.node_weights import NodeWeights
from moray.cluster.placement import first_placement
from moray.cluster.workers import ExpertHostWorker, described_compute
from moray.configs.deployment import Deployment
from moray.configs.errors import ClusterError, ConfigError
from moray.model.config import ModelConfig
from moray.model.progress import Advance

from ..model.hub_server import COMMIT, OTHER_COMMIT, REPO, HubServer

URL = f"hf://{REPO}@{COMMIT}"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Has tiny-r1."""
    files = {path.name: path.read_bytes() for path in checkpoint_path("tiny-r1").iterdir() if path.is_file()}
    with HubServer(files).running() as server:
        server.is_the_hub(monkeypatch)
        yield server


def a_deployment(models: Path, **more: Any) -> Deployment:
    return Deployment.from_dict({"model": URL, "weights_dir": str(models)} | more)


def first_table() -> tuple[ModelConfig, PlacementTable]:
    config = ModelConfig.load(checkpoint_path("tiny-r1"))
    return config, first_placement(config, Deployment().experts)


# ---- the same tokens -----------------------------------------------------------------------------------------------------


def test_a_fetched_model_answers_as_the_embedded_one(hub: HubServer, tmp_path: Path) -> None:
    def answer(model: str, **more: Any) -> list[int]:
        with LLM(model, verify="headers", **more) as llm:
            return llm.generate(["What is 17 + 25?"], temperature=0, max_tokens=16)[0].token_ids

    fetched = answer(f"hf://{REPO}", weights_dir=str(tmp_path))
    assert fetched == answer("tiny-r1")
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])
    assert hub.sent["held_out.jsonl"] == 0


def test_a_pinned_url_is_the_same_for_every_process(hub: HubServer, tmp_path: Path) -> None:
    then = pinned(a_deployment(tmp_path, model=f"hf://{REPO}@main"))
    assert then == a_deployment(tmp_path)
    hub.main = OTHER_COMMIT
    hub.requests.clear()
    assert pinned(then) == then
    assert hub.requests == []
    assert pinned(Deployment()) == Deployment()


# ---- the controller's node -----------------------------------------------------------------------------------------------


def test_the_controller_needs_no_weights(hub: HubServer, tmp_path: Path) -> None:
    def checked(speculate: str) -> bool:
        routers = {"speculate": speculate}
        local = Deployment.from_dict({"verify": "headers", "routers": routers})
        return check_model(a_deployment(tmp_path, routers=routers)) == check_model(local)

    assert checked("off")
    assert checked("on"), "its config.json is believed"
    assert not checked("auto"), "without an index nobody knows that the MTP layer is there"
    assert hub.sent[WEIGHTS] == 0
    check_model(a_deployment(tmp_path, verify="full"))
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


# ---- the nodes of experts and routers ------------------------------------------------------------------------------------


def test_a_host_fetches_what_it_loads(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    _, table = first_table()
    computing = described_compute(compute(Deployment(), gpus=0))

    def a_worker(gently: bool) -> ExpertHostWorker:
        return ExpertHostWorker(
            computing, threads=1, lease_s=600.0, gently=gently, model=URL, weights_dir=str(tmp_path)
        )

    hub.hold.clear()
    ahead = a_worker(gently=True)
    try:
        assert hub.holding.acquire(timeout=20), "a warm process fetches before it is asked to"
        read: list[Any] = []
        worker = a_worker(gently=False)
        loading = threading.Thread(target=lambda: read.append(worker.load(table.slots[host_name(0)], 1, {})))
        worker._host.become(host_name(0))
        loading.start()
        give_up = time.monotonic() + 20
        while worker.fetching() is None:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert worker.fetching() == ahead.fetching(), "one fetch, whoever tells of it"
        hub.hold.set()
        loading.join(30)
        worker.stop()
    finally:
        ahead.stop()
    assert worker.fetching() is None
    assert read[0].data > 0
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


def test_a_node_without_the_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no such directory on {os.uname().nodename}"):
        NodeWeights(str(tmp_path / "models" / "R1"), None).path()
    assert NodeWeights("tiny-r1", None).path_if_here() == checkpoint_path("tiny-r1")
    assert NodeWeights(URL, str(tmp_path)).path_if_here() is None


# ---- waiting -------------------------------------------------------------------------------------------------------------


def test_fetches_of_several_nodes_add_up() -> None:
    fetched = FetchedBytes()
    assert fetched.add([]) == (0, 0)
    assert fetched.add([("a", 10, 100), ("a", 12, 100)]) == (12, 100)
    assert fetched.add([("a", 50, 100), ("b", 5, 30)]) == (55, 130)
    assert fetched.add([("b", 20, 30)]) == (120, 130)


def test_what_is_shown_grows_with_fetches_that_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.cluster.load_progress._POLL_S", 0.001)
    shown: list[tuple[int, int]] = []
    ended = threading.Event()

    class Shown:
        @contextmanager
        def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                shown.append((done, total_bytes))
                if done == total_bytes:
                    ended.set()

            yield advance

    answers = iter([(0, 100), (20, 130), (130, 130)])
    with LoadingShown(lambda: next(answers), Shown()):
        assert ended.wait(20)
    assert shown == [(0, 100), (20, 100), (20, 130), (130, 130)]


def test_patience_lasts_as_long_as_something_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 11.0, 11.0, 15.0, 22.0, 22.0, 33.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    states = iter([1, 2, 2])
    patience = Patience(lambda: next(states), 10.0)
    for _ in range(4):
        patience.check("host")
    with pytest.raises(ClusterError, match="host: loading has not got on for 10 s"):
        patience.check("host")
    monkeypatch.undo()


def test_processes_hear_from_the_controller_while_they_load(caplog: pytest.LogCaptureFixture) -> None:
    class Process:
        def __init__(self, name: str, fails: bool) -> None:
            self.actor_name, self.fails = name, fails
            self.asked = threading.Semaphore(0)

        def bytes_loaded(self) -> int:
            self.asked.release()
            if self.fails:
                raise ClusterError("gone")
            return 1

    processes = [Process("a", True), Process("b", False)]
    with caplog.at_level(logging.INFO), InTouch(lambda: processes, 0.01):
        assert all(process.asked.acquire(timeout=20) for process in (*processes, *processes))
    assert "event=no_answer process=a reason=gone" in caplog.text


# ---- the command ---------------------------------------------------------------------------------------------------------


def test_moray_fetch(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "here"
    assert main(["fetch", f"hf://{REPO}", "--to", str(to), "--metadata"]) == 0
    assert not (to / WEIGHTS).exists()
    assert main(["fetch", f"hf://{REPO}", "--to", str(to)]) == 0
    told = capsys.readouterr().out
    assert f"{URL}: 5 files, 0.012 GB, 0.012 GB came now" in told
    assert "checked: 4 by git-sha1, 1 by sha256" in told
    assert f"in {to}" in told
    (to / WEIGHTS).write_bytes(b"damaged")
    assert main(["fetch", f"hf://{REPO}", "--to", str(to), "--verify"]) == 0
    assert f"were damaged here and are fetched again: {WEIGHTS}" in capsys.readouterr().out
    assert main(["fetch", "hf://org/none", "--to", str(to)]) == 1
    assert "hf://org/none: HTTP 404" in capsys.readouterr().err
