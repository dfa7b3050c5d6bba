"""The `moray` command: what users get wrong is said in one line, and nothing is started for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moray
from moray.cluster import admin
from moray.cluster.changes import Wanted
from moray.cluster.cli import _parser, deployment_from, main
from moray.cluster.run_state import ProcessId, RunState, ServerRecord
from moray.kernels.cpu.library import Instructions, native

TINY = Path(moray.__file__).parent / "model" / "tiny_r1"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, where it can start nothing: what is refused here is refused by itself, before any
    process of ours; only Ray's own may be on their way by then."""
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


@pytest.mark.parametrize("where", [[], ["--local"]])
def test_instructions_that_this_machine_does_not_have(
    run: Run, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native()
    assert library is not None
    monkeypatch.setattr(library, "_best", lambda: Instructions.GENERIC)
    line = refused(run, "serve", "tiny-r1", "--port", "0", "--cpu-instructions", "avx2", *where)
    assert "cpu_instructions = 'avx2'" in line
    assert "set cpu_instructions: generic" in line


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, Wanted, bool, bool]]:
    """What the command line asks of the cluster: address, what is wanted, whether it is a dry run, whether JSON."""
    calls: list[tuple[str | None, Wanted, bool, bool]] = []

    def change(address: str | None, wanted: Wanted, *, dry_run: bool, as_json: bool) -> int:
        calls.append((address, wanted, dry_run, as_json))
        return 0

    monkeypatch.setattr(admin, "change", change)
    return calls


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("scale --experts 5", Wanted(experts=5)),
        ("scale --routers 2 --experts 1", Wanted(experts=1, routers=2)),
        ("scale --replicas 3:7=2", Wanted(replicas={(3, 7): 2})),
        ("scale --replicas 3:7=2 60:255=0 --replicas 4:0=3", Wanted(replicas={(3, 7): 2, (60, 255): 0, (4, 0): 3})),
        ("rebalance", Wanted(rebalance=True)),
        ("drain expert-host-1 expert-host-0 expert-host-1", Wanted(drain=("expert-host-1", "expert-host-0"))),
    ],
)
def test_what_is_asked_of_a_running_cluster(
    run: Run, asked: list[tuple[str | None, Wanted, bool, bool]], arguments: str, wanted: Wanted
) -> None:
    assert run(*arguments.split()) == (0, "", "")
    assert run(*arguments.split(), "--address", "10.0.0.1:6379", "--dry-run", "--json") == (0, "", "")
    assert asked == [(None, wanted, False, False), ("10.0.0.1:6379", wanted, True, True)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("scale", ["--experts N", "--routers N", "--replicas LAYER:EXPERT=N"]),
        ("scale --experts 0", ["--experts", "'0'", "at least 1"]),
        ("scale --experts -2", ["--experts", "'-2'", "at least 1"]),
        ("scale --routers two", ["--routers", "'two'", "at least 1"]),
        ("scale --replicas", ["--replicas"]),
        ("scale --replicas 3:7", ["'3:7'", "LAYER:EXPERT=N", "3:7=2"]),
        ("scale --replicas 3:7=-1", ["'3:7=-1'", "LAYER:EXPERT=N"]),
        ("scale --replicas 3:7=2 3-7=2", ["'3-7=2'", "LAYER:EXPERT=N"]),
        ("scale --replicas 3:7=2 3:7=3", ["3:7=2", "3:7=3", "one of them"]),
        ("drain", ["HOST"]),
        ("rebalance 3", ["3"]),
        ("chaos --minutes 0", ["--minutes", "'0'", "above 0"]),
        ("chaos --minutes nan", ["'nan'"]),
        ("chaos --seed -1", ["--seed", "'-1'", "at least 0"]),
        ("chaos --streams 0", ["--streams", "'0'"]),
        ("chaos --faults kill,,stop", ["'kill,,stop'", "commas"]),
    ],
)
def test_what_cannot_be_asked(
    run: Run, asked: list[tuple[str | None, Wanted, bool, bool]], arguments: str, named: list[str]
) -> None:
    status, out, err = run(*arguments.split())
    assert (status, out, asked) == (2, "", [])
    for text in named:
        assert text in err.splitlines()[-1]


def test_chaos(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def chaos(**settings: Any) -> int:
        calls.append(settings)
        return 3

    module = ModuleType("moray.cluster.chaos.run")
    vars(module)["chaos"] = chaos
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert run("chaos")[0] == 3
    flags = "--seed 7 --minutes 0.5 --url http://h --faults kill,stop --streams 4 --api-key-file keys --json"
    assert run("chaos", *flags.split())[0] == 3
    standard = {
        "url": None,
        "address": None,
        "seed": 0,
        "minutes": 1.0,
        "faults": None,
        "streams": 16,
        "as_json": False,
        "key_file": None,
    }
    given = {
        "url": "http://h",
        "seed": 7,
        "minutes": 0.5,
        "faults": ("kill", "stop"),
        "streams": 4,
        "as_json": True,
        "key_file": Path("keys"),
    }
    assert calls == [standard, standard | given]


@pytest.mark.parametrize("command", [["scale", "--experts", "2"], ["rebalance"], ["drain", "expert-host-0"]])
def test_changing_a_cluster_that_is_not_there(run: Run, command: list[str]) -> None:
    line = refused(run, *command)
    assert "no server runs on this machine" in line
    assert "--address" in line


def test_changing_a_server_in_one_process(run: Run) -> None:
    own = ProcessId.of(os.getpid())
    assert own is not None
    RunState().write(ServerRecord(own, "http://127.0.0.1:8000", "tiny-r1"))
    assert "--local" in refused(run, "scale", "--experts", "3")


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
