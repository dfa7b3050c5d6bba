"""Servers shared by the tests of a session: starting one takes longer than most of what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from .serve_process import KEY, Serve


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
