"""`moray status` and `moray chat` against a running server, which they find by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .serve_process import KEY, Serve

pytestmark = pytest.mark.ray


def moray(serve: Serve, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moray.cluster.cli", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, env=serve.environment, check=False
    )


def test_status_as_json(shm_server: Serve) -> None:
    done = moray(shm_server, "status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["health"] == "ok"
    *processes, controller = status["processes"]
    assert [p["id"] for p in processes] == ["expert-host-0", "expert-host-1", "router-0"]
    assert (controller["id"], controller["role"]) == ("controller", "controller")
    assert {p["state"] for p in status["processes"]} == {"ready"}
    assert all(p["data_bytes_read"] > 1_000_000 for p in processes)


def test_status_as_a_table(shm_server: Serve) -> None:
    done = moray(shm_server, "status")
    assert done.returncode == 0, done.stderr
    for word in ("tiny-r1", "ok", "expert-host-1", "router-0", "MB", "pages free"):
        assert word in done.stdout


def test_status_needs_the_key_where_there_is_one(gloo_server: Serve, tmp_path: Path) -> None:
    without = moray(gloo_server, "status")
    assert without.returncode == 1
    assert "401" in without.stderr
    (tmp_path / "key").write_text(KEY)
    assert moray(gloo_server, "status", "--api-key-file", str(tmp_path / "key")).returncode == 0


def test_chat_answers_one_question(shm_server: Serve) -> None:
    done = moray(shm_server, "chat", "What is 2 + 3?", "--temperature", "0", "--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""


def test_chat_reads_questions_until_the_end(shm_server: Serve) -> None:
    done = moray(shm_server, "chat", "--max-tokens", "20", stdin="What is 2 + 3?\n\nAnd 4 + 5?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you: ") == 4, "two questions, an empty line and the end"


def test_chat_says_what_the_server_refuses(shm_server: Serve) -> None:
    done = moray(shm_server, "chat", "hello", "--temperature", "-1")
    assert done.returncode == 1
    assert done.stderr.startswith("moray: error: ")
    assert "temperature" in done.stderr
