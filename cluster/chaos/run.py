"""`moray chaos`: live traffic, one fault after another, and a verdict.

First the calm cluster answers a set of questions twice; what it says then, every later answer must say. Then streams ask them
all the time while faults and changes happen (`schedule`, `faults`), each followed by a wait for the cluster to be whole again.
At the end, idle, nothing may be held that was not held at the beginning (`leaks`).

Signals and leaks concern the processes on this machine; run it on each to have all of them. A network that is cut is shown by
closed sockets, see `fault_points`. Whatever is stopped or broken when this command ends, by Ctrl-C too, goes on or heals.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console

from ...configs.errors import ClusterError, ConfigError, MorayError
from .faults import Fault, fault_of
from .leaks import Snapshot, leaks, left_over, page_leaks, snapshot
from .schedule import KINDS, Round, Shape, check_kinds, rounds
from .target import HEARTBEAT_S, Target, View, connected, not_whole
from .traffic import Traffic, questions, running, undisturbed
from .verdict import Happened, Verdict

WHOLE_S: Final = 180.0
"""For the cluster to be whole again: a controller that restarts restores hosts then, one that is loaded takes its time."""

_BEGIN_S: Final = 60.0
"""For the cluster to be well and idle before anything is done."""

_IDLE_S: Final = 60.0
"""For everything to be given back once the last stream has ended."""

_CALM_S: Final = 5.0
"""Of traffic without faults, to compare the gaps with."""

_AFTER_S: Final = 0.5
"""Gaps that end so soon after the cluster is whole again still belong to the event."""


def chaos(
    *,
    url: str | None,
    address: str | None,
    seed: int,
    minutes: float,
    faults: Sequence[str] | None,
    streams: int,
    as_json: bool,
    key_file: Path | None = None,
) -> int:
    """Make a running cluster suffer and print the verdict; 0 if nothing was lost, altered or leaked, else 1.

    Args:
        url: of its HTTP API; None for the newest `moray serve` of this machine.
        address: of its Ray; None for that server's.
        seed: of the faults, their order and the questions.
        minutes: how long to begin new faults; what is under way then is seen through.
        faults: kinds to choose among (see `schedule.KINDS`); None for all.
        streams: concurrent streams.
        as_json: print the verdict as JSON to stdout, and the events to stderr.
        key_file: file whose first key the API asks for.

    Raises:
        MorayError: there is no such cluster, or it is not well to begin with; nothing was done to it.
    """
    kinds = check_kinds(faults)
    if minutes <= 0 or streams < 1:
        raise ConfigError(f"minutes = {minutes:g} and streams = {streams}: must be more than 0")
    out = sys.stderr if as_json else sys.stdout

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    with connected(url, address, key_file, say) as (target, make_client):
        verdict = _run(target, make_client, kinds, seed=seed, minutes=minutes, streams=streams, say=say)
    if as_json:
        print(json.dumps(verdict.to_dict(), indent=2))
    else:
        verdict.show(Console(highlight=False, soft_wrap=True))
    return 0 if verdict.passed else 1


def _run(
    target: Target,
    make_client: Callable[[], httpx.Client],
    kinds: Sequence[str],
    *,
    seed: int,
    minutes: float,
    streams: int,
    say: Callable[[str], None],
) -> Verdict:
    _, view = target.wait_until(lambda view: _not_idle(view, None), "whole and idle", timeout_s=_BEGIN_S)
    home = view.counts()
    shape = Shape(home["expert_host"], home["router"], view.min_replicas)
    missing = [kind for kind in kinds if KINDS[kind].role != "cluster" and not view.of_role(KINDS[kind].role)]
    if missing:
        raise ClusterError(f"the cluster lists no process for {', '.join(missing)}: leave that out with --faults")
    say(
        f"{view.model}: {shape.hosts} expert hosts, {shape.routers} routers, min_replicas {shape.min_replicas}, seed {seed}"
    )
    asked = questions(seed)
    with make_client() as client:
        answers = undisturbed(client, view.model, asked)
    say(f"{len(asked)} questions answered alike twice; {streams} streams for {minutes:g} min: {', '.join(kinds)}")
    _, view = target.wait_until(lambda view: _not_idle(view, home), "idle", timeout_s=_IDLE_S)
    before = snapshot(target, view)
    traffic = Traffic(make_client, view.model, answers, streams=streams, seed=seed)
    run = _Rounds(target, traffic, home, say)
    started = time.monotonic()
    problems = []
    try:
        with running(traffic):
            calm_gap_s = _calm(traffic)
            problems += run.until(started + 60 * minutes, rounds(seed, kinds, shape))
    except ClusterError as error:
        problems.append(str(error))
    found = _leaked(target, before, home)
    return Verdict(
        seed=seed,
        model=view.model,
        streams=streams,
        seconds=time.monotonic() - started,
        requests={str(outcome): count for outcome, count in traffic.counts.items()},
        calm_gap_s=calm_gap_s,
        events=run.events,
        failures=traffic.failures,
        leaks=found,
        problems=problems,
    )


def _not_idle(view: View, home: dict[str, int] | None) -> str:
    return not_whole(view, home) or "; ".join(page_leaks(view.routers))


def _calm(traffic: Traffic) -> float:
    started = time.monotonic()
    time.sleep(_CALM_S)
    return traffic.longest_gap(started, time.monotonic())


def _leaked(target: Target, before: Snapshot, home: dict[str, int]) -> list[str]:
    """What the cluster still holds once it had time to give back what it must."""
    deadline = time.monotonic() + _IDLE_S
    while True:
        try:
            view = target.view()
            current = [process.pid for process in view.processes]
            found = leaks(before, snapshot(target, view), left_over(target.seen.values(), current))
            if not found and not (found := [reason] if (reason := _not_idle(view, home)) else []):
                return []
        except ClusterError as error:
            found = [f"nothing can be said: {error}"]
        if time.monotonic() > deadline:
            return found
        time.sleep(1.0)


@dataclass
class _Rounds:
    """The part in which things happen."""

    target: Target
    traffic: Traffic
    home: dict[str, int]
    say: Callable[[str], None]
    events: list[Happened] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def until(self, end: float, schedule: Iterator[Round]) -> list[str]:
        """Run rounds until then; why no more could be run, if that is so."""
        said = time.monotonic()
        for planned in schedule:
            if time.monotonic() + planned.pause_s >= end:
                return []
            time.sleep(planned.pause_s)
            try:
                self._round(planned)
            except ClusterError as error:
                return [str(error)]
            if time.monotonic() - said > HEARTBEAT_S:
                said = time.monotonic()
                requests = ", ".join(f"{count} {name}" for name, count in self.traffic.counts.items() if count)
                self.say(f"  ... {max(0.0, end - said):.0f} s left; requests: {requests or 'none yet'}")
        raise AssertionError("a schedule has no end")

    def _round(self, planned: Round) -> None:
        """Do what the round says, and wait for the cluster to be whole again.

        Raises:
            ClusterError: it was not whole again in time.
        """
        _, view = self.target.wait_until(lambda view: not_whole(view, self.home), "whole", timeout_s=WHOLE_S)
        taken: set[str] = set()
        due = [fault_of(self.target, event, view, self.home, taken) for event in planned.events]
        began = time.monotonic()
        delays = (0.0, planned.stagger_s)
        interrupted = threading.Event()
        pool = ThreadPoolExecutor(len(due), thread_name_prefix="moray-fault")
        try:
            futures = [
                pool.submit(_perform, fault, event.seconds, delay, interrupted)
                for fault, event, delay in zip(due, planned.events, delays, strict=False)
            ]
            results = [future.result() for future in futures]
        finally:
            # After Ctrl-C nobody waits for what is under way, but nothing may begin any more, and nothing stay broken.
            interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for fault in due:
                fault.heal()
        gone = [pid for fault in due for pid in fault.gone]
        trouble: ClusterError | None = None
        try:
            self.target.wait_until(lambda view: not_whole(view, self.home, gone), "whole again", timeout_s=WHOLE_S)
        except ClusterError as error:
            trouble = error
        ended = time.monotonic()
        time.sleep(_AFTER_S)
        gap = self.traffic.longest_gap(began, ended + _AFTER_S)
        for fault, (at, detail, failed) in zip(due, results, strict=True):
            happened = Happened(
                at_s=at - self._started,
                kind=fault.kind,
                subject=fault.subject,
                whole_s=None if trouble else ended - at,
                gap_s=gap,
                detail=detail,
                failed=failed,
            )
            self.events.append(happened)
            self.say(happened.line())
        if trouble is not None:
            raise trouble


def _perform(fault: Fault, seconds: float, delay_s: float, interrupted: threading.Event) -> tuple[float, str, str]:
    """Do it after `delay_s`, and undo it when its time is up: when it began, what there is to say, why it failed."""
    interrupted.wait(delay_s)
    at = time.monotonic()
    if interrupted.is_set():
        return at, "", "interrupted"
    try:
        detail = fault.inject()
    except MorayError as error:
        return at, "", str(error)
    interrupted.wait(max(0.0, at + seconds - time.monotonic()))
    fault.heal()
    return at, detail, ""
