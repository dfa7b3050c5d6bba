"""Clusters for the tests: of threads, made for each; and servers, shared by those of a session, for they start slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from moray.cluster import supervisor as supervisor_module
from moray.cluster import transition as transition_module
from moray.cluster.controller import Controller
from moray.cluster.local import LLM
from moray.model.testing import write_random_checkpoint

from .serve_process import KEY, Serve
from .thread_cluster import PROMPT, ThreadSpawner, deployment


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 8 experts a layer."""
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), dtype="fp8", seed=8)


@pytest.fixture(scope="session")
def expected(checkpoint: Path) -> list[int]:
    """What it answers to `PROMPT`, undisturbed."""
    with LLM(checkpoint, experts=1) as llm:
        return llm.generate([PROMPT], max_tokens=40, temperature=0.0, ignore_eos=True)[0].token_ids


@pytest.fixture
def spawner(monkeypatch: pytest.MonkeyPatch) -> ThreadSpawner:
    """Makes clusters of threads, whose controllers wait for nothing long."""
    monkeypatch.setattr(supervisor_module, "_POLL_S", 0.05)
    monkeypatch.setattr(supervisor_module, "_PAUSES_S", (0.05, 0.1))
    monkeypatch.setattr(supervisor_module, "_STANDBY_PAUSE_S", 0.05)
    monkeypatch.setattr(supervisor_module, "_GROW_BACK_S", 0.2)
    monkeypatch.setattr(transition_module, "_DIRECTORY_SEEN_S", 0.1)
    return ThreadSpawner()


@pytest.fixture
def controller(checkpoint: Path, spawner: ThreadSpawner) -> Iterator[Controller]:
    """A cluster of two hosts and two routers that are threads."""
    controller = Controller(deployment(checkpoint, routers=2), spawner)
    controller.start()
    yield controller
    controller.stop()


@pytest.fixture(scope="session")
def serve_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serve]]:
    """Starts `moray serve` with the given arguments on a free port; ends all of them when the session ends."""
    started: list[Serve] = []

    def start(*arguments: str, runtime: Path | None = None) -> Serve:
        serve = Serve(tmp_path_factory.mktemp("serve"), ["--port", "0", *arguments], runtime=runtime)
        started.append(serve)
        return serve

    yield start
    for serve in started:
        serve.take_down()


@pytest.fixture(scope="session")
def shm_server(serve_factory: Callable[..., Serve]) -> Serve:
    """tiny-r1 with two expert hosts over shared memory, as in the README."""
    return serve_factory("tiny-r1", "--experts", "2").wait_ready()


@pytest.fixture(scope="session")
def gloo_server(serve_factory: Callable[..., Serve], tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """tiny-r1 with three expert hosts over gloo, a key and narrow limits, from a deployment file."""
    folder = tmp_path_factory.mktemp("gloo")
    (folder / "keys").write_text(f"# test\n{KEY}\n")
    deployment = {
        "model": "tiny-r1",
        "link": "gloo",
        "experts": {"hosts": 3, "reply_timeout_s": 4.0},
        "routers": {"max_running": 16, "max_waiting": 20},
        "front": {"api_key_file": str(folder / "keys"), "body_limit_bytes": 20000},
    }
    (folder / "deployment.yaml").write_text(yaml.safe_dump(deployment))
    return serve_factory("--config", str(folder / "deployment.yaml")).wait_ready()
