"""What came of it: plain data, judged by one rule, printed as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Happened:
    """One event, over.

    Attributes:
        at_s: since the start.
        whole_s: from its beginning until the cluster was whole again; None if it never was.
        gap_s: the longest gap between two tokens of one stream meanwhile. Events that come together share it.
        detail: the rest, in words.
        failed: why it could not be done; empty otherwise.
    """

    at_s: float
    kind: str
    subject: str
    whole_s: float | None
    gap_s: float
    detail: str = ""
    failed: str = ""

    def line(self) -> str:
        """As it is printed when it is over."""
        head = f"{self.at_s:7.1f} s  {self.kind:15} {self.subject:16}"
        if self.failed:
            return f"{head} could not be done: {self.failed}"
        whole = "not whole again" if self.whole_s is None else f"whole again after {self.whole_s:5.1f} s"
        return f"{head} {whole}, longest gap {self.gap_s:5.2f} s  {self.detail}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A whole run.

    Attributes:
        seconds: of traffic and faults.
        requests: by what became of them: finished, cancelled, altered, lost, refused.
        calm_gap_s: longest gap between two tokens while nothing was done.
        failures: altered and lost requests in words.
        leaks: what is held at the end and should not be.
        problems: what else is wrong, e.g. that the cluster did not become whole again.
    """

    seed: int
    model: str
    streams: int
    seconds: float
    requests: Mapping[str, int]
    calm_gap_s: float
    events: Sequence[Happened] = ()
    failures: Sequence[str] = ()
    leaks: Sequence[str] = ()
    problems: Sequence[str] = field(default=())

    @property
    def reasons(self) -> list[str]:
        """Why the run has failed; empty if it has not. One that answered nothing, or did nothing, shows nothing."""
        found = [f"{count} requests {name}" for name in ("altered", "lost") if (count := self.requests.get(name, 0))]
        if not self.requests.get("finished", 0):
            found.append("no request finished")
        if not any(not event.failed for event in self.events):
            found.append("nothing was done to the cluster")
        return found + [f"leak: {leak}" for leak in self.leaks] + list(self.problems)

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, altered or leaked."""
        return not self.reasons

    def gaps(self) -> dict[str, tuple[int, float, float]]:
        """For each kind: how many times it happened, median and longest of the gaps."""
        by_kind: dict[str, list[float]] = {}
        for event in self.events:
            if not event.failed:
                by_kind.setdefault(event.kind, []).append(event.gap_s)
        return {kind: (len(gaps), sorted(gaps)[len(gaps) // 2], max(gaps)) for kind, gaps in sorted(by_kind.items())}

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON, the judgement included."""
        return {"passed": self.passed, "reasons": self.reasons, **asdict(self)}

    def show(self, console: Console) -> None:
        """Print the tables and the judgement."""
        kinds = Table(
            "event", "times", "median gap", "longest gap", "whole again, longest", box=None, header_style="bold"
        )
        for kind, (times, median, longest) in self.gaps().items():
            whole = [event.whole_s for event in self.events if event.kind == kind and not event.failed]
            known = [seconds for seconds in whole if seconds is not None]
            slowest = f"{max(known):.1f} s" if len(known) == len(whole) else "never"
            kinds.add_row(kind, str(times), f"{median:.2f} s", f"{longest:.2f} s", slowest)
        kinds.add_row("(calm)", "", "", f"{self.calm_gap_s:.2f} s", "")
        console.print(kinds)
        requests = ", ".join(f"{count} {name}" for name, count in self.requests.items())
        console.print(f"requests: {requests}; {self.streams} streams, {self.seconds:.0f} s, seed {self.seed}")
        for event in self.events:
            if event.failed:
                console.print(f"{event.kind} at {event.at_s:.1f} s could not be done: {event.failed}", markup=False)
        for failure in self.failures[:10]:
            console.print(f"  {failure}", markup=False)
        console.print(f"leaks: {len(self.leaks)}")
        if self.passed:
            console.print("passed: nothing was lost, altered or leaked")
        else:
            for reason in self.reasons:
                console.print(f"failed: {reason}", markup=False)
