"""How `moray chaos` goes about it: what it stops goes on again, whatever happens, and it waits until the cluster is whole."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.cluster.changes import Change, Wanted
from moray.cluster.chaos import run
from moray.cluster.chaos.faults import DrainHost, Fault, KillHost, ScaleExperts, StopHost
from moray.cluster.chaos.schedule import Event, Round
from moray.cluster.chaos.target import Process, Target, View
from moray.cluster.chaos.traffic import Traffic
from moray.configs.errors import ClusterError, ConfigError

HOME = {"expert_host": 2}
EVENT = Event("stop-host", 0, 0.0, 0)


class FakeTarget(Target):
    """A cluster that is what the test says, with one process of this machine."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.asked: list[Wanted] = []
        self.refusals = 0
        self.trouble = ""
        self.lines: list[str] = []
        self._say = self.lines.append

    def view(self) -> View:
        return View("m", 1, "ok", "", 2, 0, (self.process,))

    def is_here(self, process: Process) -> bool:
        return process.node == "here"

    def wait_until(self, check: Callable[[View], str], what: str, *, timeout_s: float) -> tuple[float, View]:
        if self.trouble and "again" in what:
            raise ClusterError(self.trouble)
        return 0.0, self.view()

    def change(self, wanted: Wanted, *, timeout_s: float = 1.0) -> Change:
        self.asked.append(wanted)
        if self.refusals:
            self.refusals -= 1
            raise ClusterError("a host has died")
        return Change(epoch=len(self.asked))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like one of Ray's."""
    program = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["ray::ExpertHostWorker", "-c", program],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def host(pid: int, node: str = "here") -> Process:
    return Process("expert-host-0", "expert_host", pid, node, "ready")


def wait_for_state(pid: int, wanted: str) -> None:
    give_up = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in wanted:
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_stopped_process_goes_on(child: subprocess.Popen[bytes]) -> None:
    fault = StopHost(FakeTarget(host(child.pid)), EVENT, HOME, host(child.pid))
    fault.heal()
    fault.inject()
    wait_for_state(child.pid, "T")
    fault.heal()
    wait_for_state(child.pid, "SR")
    assert fault.gone == ()
    fault.heal()


def test_a_killed_process(child: subprocess.Popen[bytes]) -> None:
    fault = KillHost(FakeTarget(host(child.pid)), EVENT, HOME, host(child.pid))
    fault.inject()
    assert child.wait(20) == -9
    assert fault.gone == (child.pid,)
    fault.heal()


def test_only_the_clusters_own_processes_here(child: subprocess.Popen[bytes]) -> None:
    elsewhere = host(child.pid, "elsewhere")
    with pytest.raises(ClusterError, match="runs on elsewhere, not on this machine"):
        KillHost(FakeTarget(elsewhere), EVENT, HOME, elsewhere).inject()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with pytest.raises(ClusterError, match="no process of Ray's"):
            KillHost(FakeTarget(host(other.pid)), EVENT, HOME, host(other.pid)).inject()
        assert other.poll() is None
        other.kill()


def test_changes_come_back_and_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.cluster.chaos.faults._AT_WORK_S", 0.0)
    monkeypatch.setattr("moray.cluster.chaos.target._RETRY_PAUSE_S", 0.0)
    target = FakeTarget(host(1))
    said = ScaleExperts(target, EVENT, HOME, None).inject()
    assert target.asked == [Wanted(experts=3), Wanted(experts=2)]
    assert said.startswith("epoch 1")
    target = FakeTarget(host(1))
    target.refusals = 1
    DrainHost(target, EVENT, HOME, None).inject()
    assert "a change failed and is tried again: a host has died" in target.lines[0]
    assert target.asked == [
        Wanted(experts=3),
        Wanted(experts=3),
        Wanted(drain=("expert-host-0",)),
        Wanted(experts=2),
    ]


class FakeFault(Fault):
    kind = "stop-host"

    def __init__(self, effect: Callable[[], str]) -> None:
        super().__init__(FakeTarget(host(1)), EVENT, HOME, host(1))
        self._effect = effect
        self.healed = threading.Event()

    def inject(self) -> str:
        return self._effect()

    def heal(self) -> None:
        self.healed.set()


def rounds_with(fault: FakeFault, monkeypatch: pytest.MonkeyPatch, trouble: str = "") -> run._Rounds:
    target = FakeTarget(host(1))
    target.trouble = trouble
    monkeypatch.setattr(run, "fault_of", lambda *_: fault)
    monkeypatch.setattr(run, "_AFTER_S", 0.0)
    traffic = Traffic(lambda: pytest.fail("no client is needed"), "m", {}, streams=1, seed=0)
    return run._Rounds(target, traffic, HOME, target.lines.append)


ROUND = Round(0.0, 0.0, (EVENT,))


def test_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FakeFault(lambda: "done")
    rounds = rounds_with(fault, monkeypatch)
    rounds._round(ROUND)
    (event,) = rounds.events
    assert (event.detail, event.failed, event.subject) == ("done", "", "expert-host-0")
    assert fault.healed.is_set()


def test_a_round_that_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ClusterError("nobody is there")

    fault = FakeFault(refuse)
    rounds = rounds_with(fault, monkeypatch)
    rounds._round(ROUND)
    assert rounds.events[0].failed == "nobody is there"
    assert fault.healed.is_set()


def test_a_cluster_that_does_not_recover_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FakeFault(lambda: "done")
    rounds = rounds_with(fault, monkeypatch, trouble="not whole again within 180 s")
    assert rounds.until(time.monotonic() + 60, iter([ROUND, ROUND])) == ["not whole again within 180 s"]
    (event,) = rounds.events
    assert event.whole_s is None
    assert fault.healed.is_set()


def test_an_interrupt_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    fault = FakeFault(interrupted)
    rounds = rounds_with(fault, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        rounds._round(ROUND)
    assert fault.healed.is_set()


def test_nothing_begins_after_an_interrupt() -> None:
    fault = FakeFault(lambda: pytest.fail("it was interrupted"))
    interrupted = threading.Event()
    interrupted.set()
    assert run._perform(fault, 5.0, 5.0, interrupted)[2] == "interrupted"


@pytest.mark.parametrize("wrong", [{"minutes": 0.0}, {"streams": 0}, {"faults": ["kill"]}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"seed": 0, "minutes": 1.0, "faults": None, "streams": 1, "as_json": False, **wrong}
    with pytest.raises(ConfigError):
        run.chaos(url=None, address=None, **settings)


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ClusterError, match="--url and --address"):
        run.chaos(url=None, address=None, seed=0, minutes=1, faults=None, streams=1, as_json=False)
    with pytest.raises(ClusterError, match="give --address too"):
        run.chaos(url="http://x", address=None, seed=0, minutes=1, faults=None, streams=1, as_json=False)
