"""Records of servers, and the processes they name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moray.cluster.run_state import ProcessId, RunState, ServerRecord, descendants, end_processes, with_processes

from .serve_process import eventually


def sleeper(code: str = "") -> subprocess.Popen[str]:
    script = f"{code}\nprint('up', flush=True)\nimport time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def identity(process: subprocess.Popen[str]) -> ProcessId:
    found = ProcessId.of(process.pid)
    assert found is not None
    return found


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Put processes in here; they are ended and reaped."""
    made: list[subprocess.Popen[str]] = []
    yield made
    for process in made:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    return RunState(tmp_path / "moray")


def test_a_record_comes_back_as_it_was_written(state: RunState) -> None:
    record = ServerRecord(ProcessId(7, 8), "http://127.0.0.1:1", "tiny-r1", "/tmp/session", (ProcessId(1, 2),))
    assert state.records() == []
    state.write(record)
    assert state.records() == [record]
    changed = replace(record, url="http://127.0.0.1:2")
    state.write(changed)
    assert state.records() == [changed]
    (file,) = state.folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0, "nobody else's business"
    state.remove(record)
    assert list(state.folder.iterdir()) == []


def test_the_newest_server_comes_first(state: RunState) -> None:
    for started in (5, 9, 7):
        state.write(ServerRecord(ProcessId(100 + started, started), "", ""))
    assert [record.server.started for record in state.records()] == [9, 7, 5]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"server": {"pid": 1}}'])
def test_what_is_no_record_is_removed(state: RunState, text: str) -> None:
    state.folder.mkdir()
    (state.folder / "1-1.json").write_text(text)
    assert state.records() == []
    assert list(state.folder.iterdir()) == []


def test_cleaning_up_ends_what_a_dead_server_left(
    state: RunState, processes: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    server, left = sleeper(), sleeper()
    processes += [server, left]
    session = tmp_path / "session"
    (session / "logs").mkdir(parents=True)
    record = ServerRecord(identity(server), "", "", str(session), (identity(left),))
    state.write(record)

    assert state.clean_up() == [], "the server runs"
    assert identity(left) == record.processes[0]

    server.kill()
    server.wait()
    (line,) = state.clean_up()
    assert f"pid {server.pid}" in line
    assert "ended 1 process " in line
    assert not record.processes[0].alive
    assert not session.exists()
    assert state.records() == []
    assert state.clean_up() == []


def test_a_pid_that_was_used_again_is_left_alone(state: RunState, processes: list[subprocess.Popen[str]]) -> None:
    stranger = sleeper()
    processes.append(stranger)
    someone = identity(stranger)
    before = ProcessId(someone.pid, someone.started - 1)
    state.write(ServerRecord(before, "", "", "", (before,)))
    (line,) = state.clean_up()
    assert "ended 0 processes" in line
    assert someone.alive


def test_a_process_that_does_not_listen_is_killed(processes: list[subprocess.Popen[str]]) -> None:
    deaf = sleeper("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    processes.append(deaf)
    found = identity(deaf)
    assert end_processes([found], grace_s=0.2) == 1
    assert not found.alive
    assert end_processes([found]) == 0


def test_descendants_are_found_at_any_depth(processes: list[subprocess.Popen[str]]) -> None:
    parent = sleeper("import subprocess, sys; p = subprocess.Popen(['sleep', '600'])")
    processes.append(parent)
    (child,) = eventually(lambda: descendants(parent.pid), "the child runs")
    own = ProcessId.of(os.getpid())
    assert own is not None
    record = with_processes(ServerRecord(own, "", ""))
    assert {identity(parent), child} <= set(record.processes)
    end_processes([identity(parent), child])
    assert not {identity(parent) if parent.poll() is None else child, child} & set(with_processes(record).processes)


def test_the_remains_of_a_process_are_not_alive(processes: list[subprocess.Popen[str]]) -> None:
    child = sleeper()
    processes.append(child)
    found = identity(child)
    child.kill()
    eventually(lambda: not found.alive, "a zombie does not count")
