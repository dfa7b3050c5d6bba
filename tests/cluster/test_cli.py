"""The `moray` command: what users get wrong is said in one line, and nothing is started for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moray
from moray.cluster.cli import _parser, deployment_from, main
from moray.cluster.run_state import ProcessId, RunState, ServerRecord

TINY = Path(moray.__file__).parent / "model" / "tiny_r1"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, up to where it would start something: nothing here gets so far."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))

    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", started)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        out, err = capsys.readouterr()
        return status, out, err

    return run


def refused(run: Run, *arguments: str) -> str:
    """The one line a refusal prints."""
    status, out, err = run(*arguments)
    assert status == 1, err
    assert out == ""
    assert err.startswith("moray: error: ")
    assert err.count("\n") == 1, err
    return err


def truncated(folder: Path) -> Path:
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("training", "__pycache__"))
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    return folder


def test_a_model_that_is_not_there(run: Run) -> None:
    line = refused(run, "serve", "/no/such/model")
    assert "/no/such/model" in line
    assert "tiny-r1" in line


def test_a_directory_that_is_no_checkpoint(run: Run, tmp_path: Path) -> None:
    assert "config.json" in refused(run, "serve", str(tmp_path), "--port", "0")


@pytest.mark.parametrize("where", [[], ["--local"]])
def test_a_damaged_checkpoint(run: Run, tmp_path: Path, where: list[str]) -> None:
    line = refused(run, "serve", str(truncated(tmp_path / "model")), "--port", "0", *where)
    assert "model.safetensors" in line


@pytest.mark.parametrize("where", [[], ["--local"]])
def test_a_port_that_is_taken(run: Run, where: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(run, "serve", "tiny-r1", "--port", port, *where)
    assert port in line
    assert "--port" in line


def test_an_address_that_is_another_machines(run: Run) -> None:
    assert "203.0.113.9" in refused(run, "serve", "tiny-r1", "--host", "203.0.113.9")


def test_no_expert_hosts(run: Run) -> None:
    line = refused(run, "serve", "tiny-r1", "--experts", "0")
    assert "experts.hosts = 0" in line
    assert "greater than or equal to 1" in line


@pytest.mark.parametrize("where", [[], ["--local"]])
def test_more_expert_hosts_than_experts(run: Run, where: list[str]) -> None:
    line = refused(run, "serve", "tiny-r1", "--experts", "999", "--port", "0", *where)
    assert "999" in line
    assert "at most" in line


def test_a_context_the_model_was_not_made_for(run: Run) -> None:
    assert "1000000" in refused(run, "serve", "tiny-r1", "--max-context", "1000000", "--port", "0")


def test_a_key_file_without_keys(run: Run, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    assert "no key" in refused(run, "serve", "tiny-r1", "--api-key-file", str(tmp_path / "keys"), "--port", "0")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: [tiny-r1\n", "YAML"),
        ("- tiny-r1\n", "list"),
        ("model: tiny-r1\nexpert: {hosts: 2}\n", "expert"),
        ("model: tiny-r1\nexperts: {hosts: two}\n", "'two'"),
        ("model: tiny-r1\nrouters: {token_budget: 8}\n", "token_budget = 8"),
    ],
)
def test_a_deployment_file_that_cannot_be_used(run: Run, tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(text)
    line = refused(run, "serve", "--config", str(file))
    assert named in line
    assert str(file) in line


def test_a_deployment_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(run, "serve", "--config", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("arguments", [["serve", "--exprets", "2"], ["serve", "--port", "many"], ["server"], []])
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert "moray" in err
    assert "error: " in err


@pytest.mark.parametrize("command", [["status"], ["chat", "hello"]])
def test_without_a_server(run: Run, command: list[str]) -> None:
    assert "moray serve" in refused(run, *command)


@pytest.mark.parametrize("command", [["status"], ["chat", "hello"]])
def test_with_nobody_at_the_url(run: Run, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    line = refused(run, *command, "--url", url)
    assert url in line


def test_with_a_server_that_is_still_starting(run: Run, tmp_path: Path) -> None:
    own = ProcessId.of(os.getpid())
    assert own is not None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    RunState().write(ServerRecord(own, url, "tiny-r1"))
    assert "starting" in refused(run, "status")


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text("model: tiny-r1\nname: from-file\nexperts: {hosts: 3, cpus: 2}\nfront: {port: 1234}\n")
    options = _parser().parse_args(["serve", "--config", str(file), "--experts", "5", "--port", "0"])
    deployment = deployment_from(options)
    assert (deployment.experts.hosts, deployment.experts.cpus) == (5, 2)
    assert (deployment.front.port, deployment.served_name) == (0, "from-file")


def test_importing_the_command_is_cheap() -> None:
    """`moray --help` and `moray status` must not wait for torch and ray."""
    script = "import sys, moray.cluster.cli, moray.cluster.client; print({'torch', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
