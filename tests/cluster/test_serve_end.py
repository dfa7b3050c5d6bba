"""How servers end: in order, in a hurry, in the middle of a start, and killed. Nothing may stay behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from .serve_process import START_S, Serve, eventually

pytestmark = pytest.mark.ray

STREAM = {"model": "tiny-r1", "prompt": [100] * 40, "max_tokens": 1500, "ignore_eos": True, "stream": True}


def ray_sessions() -> set[str]:
    folder = f"/tmp/moray-{os.getuid()}/ray"
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def sessions_of(serve: Serve) -> set[str]:
    """Session directories that carry the server's pid in their name."""
    return {name for name in ray_sessions() if name.endswith(f"_{serve.process.pid}")}


def shared_memory_of(serve: Serve) -> list[str]:
    """Names in /dev/shm that processes of this server hold or left, by who made them."""
    return [name for name in os.listdir("/dev/shm") if "moray" in name or str(serve.process.pid) in name]


def assert_nothing_left(serve: Serve) -> None:
    eventually(lambda: not serve.leftovers(), "every process has ended", within_s=10.0)
    assert serve.records() == []
    assert shared_memory_of(serve) == []


@pytest.mark.timeout(600)
def test_what_a_killed_server_leaves_is_cleaned_up_by_the_next(
    serve_factory: Callable[..., Serve], tmp_path: Path
) -> None:
    killed = serve_factory("tiny-r1", "--experts", "2", runtime=tmp_path).wait_ready()
    eventually(lambda: len(killed.processes()) >= 10, "Ray's processes and ours run")
    left = killed.records()
    assert len(left) == 2, "of its processes, and of its Ray's token"
    assert len(sessions_of(killed)) == 1
    killed.process.kill()
    killed.process.wait()
    assert killed.records() == left, "it had no chance to remove them"

    after = serve_factory("tiny-r1", "--experts", "2", runtime=tmp_path).wait_ready()
    assert f"moray: cleaned up after the server with pid {killed.process.pid}" in after.stdout
    assert killed.leftovers() == []
    assert sessions_of(killed) == set()
    assert len(after.records()) == 2

    # The second one ends in order, with requests in flight and under an impatient user's hands.
    with ExitStack() as stack:
        client = stack.enter_context(after.client())
        streams = [stack.enter_context(client.stream("POST", "/v1/completions", json=STREAM)) for _ in range(3)]
        assert [next(stream.iter_lines())[:5] for stream in streams] == ["data:"] * 3
        assert after.end(signal.SIGINT, signal.SIGINT, signal.SIGTERM) == 0
    assert_nothing_left(after)
    assert sessions_of(after) == set()
    assert after.stdout.splitlines()[-1] == "moray: stopping"
    assert after.stderr == ""


def runs(serve: Serve, title: str) -> bool:
    """Whether a process with this title was started below the server."""
    return any(title in command_line(process.pid) for process in serve.processes())


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("stop", "once_runs"),
    [(signal.SIGINT, "gcs_server"), (signal.SIGINT, "ray::ServeReplica"), (signal.SIGTERM, "ray::ServeReplica")],
)
def test_a_start_can_be_interrupted(serve_factory: Callable[..., Serve], stop: signal.Signals, once_runs: str) -> None:
    serve = serve_factory("tiny-r1", "--experts", "2")
    eventually(lambda: runs(serve, once_runs), f"{once_runs} runs", within_s=START_S)
    assert "ready" not in serve.stdout

    assert serve.end(stop, stop) == 130
    assert_nothing_left(serve)
    assert sessions_of(serve) == set()
    assert "Traceback" not in serve.stderr


def test_a_cluster_that_cannot_start_says_why(serve_factory: Callable[..., Serve]) -> None:
    serve = serve_factory("tiny-r1", "--experts", "2", "--link", "nccl")
    eventually(lambda: serve.processes() and serve.process.poll() is not None, "it gives up", within_s=START_S)
    assert serve.process.returncode == 1
    errors = [line for line in serve.stderr.splitlines() if line.startswith("moray: error: ")]
    assert len(errors) == 1
    assert "nccl" in errors[0]
    assert "Traceback" not in serve.stderr
    assert_nothing_left(serve)
    assert sessions_of(serve) == set()


def test_a_local_server_ends_in_order(serve_factory: Callable[..., Serve]) -> None:
    serve = serve_factory("tiny-r1", "--local").wait_ready()
    with serve.client() as client, client.stream("POST", "/v1/completions", json=STREAM) as stream:
        next(stream.iter_lines())
        assert serve.end(signal.SIGTERM, signal.SIGINT) == 0
    assert_nothing_left(serve)
    assert serve.stderr == ""


def test_a_server_whose_whole_process_group_is_ended(serve_factory: Callable[..., Serve]) -> None:
    """As service managers do: SIGTERM to it and to everything below it."""
    serve = serve_factory("tiny-r1", "--experts", "2").wait_ready()
    for process in serve.processes():
        os.kill(process.pid, signal.SIGTERM)
    assert serve.end(signal.SIGTERM) == 0
    assert_nothing_left(serve)
    assert sessions_of(serve) == set()
    assert "Traceback" not in serve.stderr


def test_a_server_whose_ray_has_ended(serve_factory: Callable[..., Serve]) -> None:
    serve = serve_factory("tiny-r1", "--experts", "1").wait_ready()
    (gcs,) = (process.pid for process in serve.processes() if "gcs_server" in command_line(process.pid).split(" ")[0])
    os.kill(gcs, signal.SIGKILL)
    eventually(lambda: serve.process.poll() is not None, "it gives up")
    assert serve.process.returncode == 1
    assert "moray: error: Ray's gcs_server ended" in serve.stderr
    assert_nothing_left(serve)
    assert sessions_of(serve) == set()
