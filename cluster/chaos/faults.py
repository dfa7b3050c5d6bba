"""What can be done to a running cluster, one class for each kind of event.

Signals go to processes of this machine alone. Faults of other sorts are asked of the process itself (`fault_points`) and heal
by themselves. Changes of the cluster (`scale-experts` and the like) are no faults, but come between them, and may fail while
one is active: then they are asked for again, as an operator would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final

from ...actors.placement_table import is_cold
from ...configs.errors import ClusterError
from ..changes import Wanted
from ..run_state import ProcessId
from .schedule import KINDS, Event
from .target import Process, Target, View

CHANGE_S: Final = 180.0
"""For a change that may fail as long as a fault is active."""

_ROOM_S: Final = 30.0
"""For a change that adds processes: on a cluster without room for them it fails for good, and the next event is due."""

_AT_WORK_S: Final = 2.0
"""How long what was added works before it is taken away again."""

_WATCH_POLL_S: Final = 0.02


class Fault(ABC):
    """One event at one cluster.

    Args:
        home: processes of each role there are when nothing happens; changes come back to that.
        victim: the process it happens to; None for changes.

    Attributes:
        subject: what it happens to, in words.
    """

    kind: ClassVar[str]

    def __init__(self, target: Target, event: Event, home: Mapping[str, int], victim: Process | None) -> None:
        self.target = target
        self.event = event
        self.home = home
        self.victim = victim
        self.subject = "the cluster" if victim is None else victim.id

    @abstractmethod
    def inject(self) -> str:
        """Do it, and return once it is done; what there is to say about it.

        Raises:
            ClusterError: it could not be done.
        """

    def heal(self) -> None:  # noqa: B027  # most faults have nothing to undo
        """Undo what would stay. Any number of times, also where `inject` was never called or was interrupted."""

    @property
    def gone(self) -> tuple[int, ...]:
        """Processes that cannot be part of the cluster any more once it is whole."""
        return ()

    def _victim(self) -> Process:
        if self.victim is None:
            raise ClusterError(f"{self.kind}: there is no process to do it to")
        return self.victim


class _Signalled(Fault):
    """Faults that are signals."""

    def __init__(self, target: Target, event: Event, home: Mapping[str, int], victim: Process | None) -> None:
        super().__init__(target, event, home, victim)
        self._process: ProcessId | None = None

    def _send(self, number: signal.Signals) -> None:
        victim = self._victim()
        if not self.target.is_here(victim):
            raise ClusterError(
                f"{victim.id} runs on {victim.node}, not on this machine: run `moray chaos` there, or leave {self.kind} out"
            )
        process = ProcessId.of(victim.pid)
        if process is None or b"ray::" not in Path(f"/proc/{victim.pid}/cmdline").read_bytes():
            raise ClusterError(f"{victim.id}: pid {victim.pid} is no process of Ray's here")
        self._process = process
        os.kill(victim.pid, number)


class _Kill(_Signalled):
    def inject(self) -> str:
        self._send(signal.SIGKILL)
        return f"pid {self._victim().pid}"

    @property
    def gone(self) -> tuple[int, ...]:
        return () if self._process is None else (self._process.pid,)


class KillHost(_Kill):
    """An expert host dies."""

    kind = "kill-host"


class KillRouter(_Kill):
    """A router dies."""

    kind = "kill-router"


class KillController(_Kill):
    """The controller dies; serving goes on meanwhile."""

    kind = "kill-controller"


class _Stop(_Signalled):
    def inject(self) -> str:
        self._send(signal.SIGSTOP)
        return f"pid {self._victim().pid} for {self.event.seconds:.1f} s"

    def heal(self) -> None:
        # One that was replaced meanwhile has been killed; its pid may be another's.
        if self._process is not None and self._process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGCONT)


class StopHost(_Stop):
    """An expert host stands still; if that takes long it is replaced."""

    kind = "stop-host"


class StopRouter(_Stop):
    """A router stands still; if that takes long it is replaced."""

    kind = "stop-router"


class _Asked(Fault):
    """Faults that the process itself is asked for."""

    def inject(self) -> str:
        links = self.target.inject(self._victim().actor, self.kind, self.event.seconds, seed=self.event.seed)
        return f"for {self.event.seconds:.1f} s, {links} links"


class CutHost(_Asked):
    """The links of an expert host are cut."""

    kind = "cut-host"


class SlowHost(_Asked):
    """An expert host takes its time."""

    kind = "slow-host"


class CorruptReply(_Asked):
    """Replies of an expert host arrive damaged."""

    kind = "corrupt-reply"


class FullMemory(_Asked):
    """An expert host gets no shared memory for its replies."""

    kind = "full-memory"


class _Change(Fault):
    """Changes to another state and back; the cold tier stays what it is."""

    def _hosts(self) -> int:
        """Expert hosts there should be, without those of the cold tier."""
        return self.home["expert_host"] - len(self._serving(cold=True))

    def _serving(self, *, cold: bool) -> list[Process]:
        return [host for host in self.target.view().of_role("expert_host") if is_cold(host.id) is cold]

    def _there_and_back(self, there: Wanted, back: Wanted) -> str:
        try:
            done, failures = self.target.change_until_done(there, timeout_s=_ROOM_S)
        except ClusterError as error:
            said = f"not done: {error}"
        else:
            said = f"epoch {done.epoch} in {done.seconds:.2f} s{_failed(failures)}"
            time.sleep(_AT_WORK_S)
        done, failures = self.target.change_until_done(back, timeout_s=CHANGE_S)
        return f"{said}; back: epoch {done.epoch} in {done.seconds:.2f} s{_failed(failures)}"


class ScaleExperts(_Change):
    """One or two expert hosts come, and go again."""

    kind = "scale-experts"

    def inject(self) -> str:
        """See `Fault.inject`."""
        hosts = self._hosts()
        return self._there_and_back(Wanted(experts=hosts + 1 + self.event.seed % 2), Wanted(experts=hosts))


class ScaleRouters(_Change):
    """A router comes, and goes again."""

    kind = "scale-routers"

    def inject(self) -> str:
        """See `Fault.inject`."""
        routers = self.home["router"]
        return self._there_and_back(Wanted(routers=routers + 1), Wanted(routers=routers))


class Rebalance(_Change):
    """Experts move for the load that was measured."""

    kind = "rebalance"

    def inject(self) -> str:
        """See `Fault.inject`."""
        done, failures = self.target.change_until_done(Wanted(rebalance=True), timeout_s=CHANGE_S)
        return f"{done.moved} of {done.total} experts moved in {done.seconds:.2f} s{_failed(failures)}"


class DrainHost(_Change):
    """One of the expert hosts is emptied and ended, and another takes its place."""

    kind = "drain-host"

    def inject(self) -> str:
        """See `Fault.inject`."""
        hosts = self._serving(cold=False)
        chosen = hosts[self.event.victim % len(hosts)]
        self.subject = chosen.id
        count = self._hosts()
        more = Wanted(experts=count + 1)
        try:
            self.target.change_until_done(more, timeout_s=_ROOM_S)
            done, failures = self.target.change_until_done(Wanted(drain=(chosen.id,)), timeout_s=CHANGE_S)
        except ClusterError as error:
            said = f"not done: {error}"
        else:
            said = f"{', '.join(done.removed) or 'nothing'} left in {done.seconds:.2f} s{_failed(failures)}"
        self.target.change_until_done(Wanted(experts=count), timeout_s=CHANGE_S)
        return said


class DiskError(_Change):
    """No checkpoint can be read while hosts are added: the change must fail and leave all as it was, or do without."""

    kind = "disk-error"

    def inject(self) -> str:
        """See `Fault.inject`."""
        hosts = self._hosts()
        watch = _DiskWatch(self.target, self.event)
        watch.start()
        try:
            said = self._there_and_back(Wanted(experts=hosts + 1), Wanted(experts=hosts))
        finally:
            watch.stop()
        return f"{watch.count} processes for {self.event.seconds:.1f} s; {said}"


class _DiskWatch:
    """Breaks the disk of every expert host there is and, as they come, of those that come: which of them loads is not known."""

    def __init__(self, target: Target, event: Event) -> None:
        self.count = 0
        self._target = target
        self._event = event
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moray-disk-watch", daemon=True)

    def start(self) -> None:
        self._broken: set[str] = set()
        self._until = time.monotonic() + self._event.seconds
        self._break_new()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_WATCH_POLL_S) and time.monotonic() < self._until:
            self._break_new()

    def _break_new(self) -> None:
        routers = {process.actor for process in self._target.view().of_role("router")}
        for actor in self._target.actors():
            left = self._until - time.monotonic()
            if actor in self._broken or actor in routers or actor.startswith("router") or left <= 0:
                continue
            self._broken.add(actor)
            # It may be leaving; and one that has its disk back sooner than others only makes the change easier.
            with contextlib.suppress(ClusterError):
                self._target.inject(actor, DiskError.kind, left)
                self.count += 1


def _failed(failures: int) -> str:
    return f" after {failures} failed tries" if failures else ""


_CLASSES: Final[dict[str, type[Fault]]] = {
    found.kind: found
    for found in (
        KillHost,
        KillRouter,
        KillController,
        StopHost,
        StopRouter,
        CutHost,
        SlowHost,
        CorruptReply,
        FullMemory,
        DiskError,
        ScaleExperts,
        ScaleRouters,
        Rebalance,
        DrainHost,
    )
}
assert set(_CLASSES) == set(KINDS), "every kind has a class"


def fault_of(target: Target, event: Event, view: View, home: Mapping[str, int], taken: set[str]) -> Fault:
    """The fault of an event at one of the processes in `view` that are not in `taken`; adds the victim to them.

    Raises:
        ClusterError: there is no process that it could happen to.
    """
    role = KINDS[event.kind].role
    victim: Process | None = None
    if role != "cluster":
        candidates = sorted((p for p in view.of_role(role) if p.id not in taken), key=lambda p: p.id)
        if not candidates:
            raise ClusterError(f"{event.kind}: the status has no {role} that it could happen to")
        victim = candidates[event.victim % len(candidates)]
        taken.add(victim.id)
    return _CLASSES[event.kind](target, event, home, victim)
