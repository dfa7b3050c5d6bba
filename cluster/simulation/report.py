"""A simulation as tables on a terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..planning import assumptions
from ..planning.assumptions import Assumption
from .cluster import NODE_NOTICED, PROCESS_NOTICED, STANDBY_START, Site
from .engine import Options
from .measure import Percentiles, Result
from .trace import Trace

_MOMENTS_SHOWN = 12
_HAPPENINGS_SHOWN = 20

APPROXIMATIONS = (
    "a step draws a few of its layers, each of which stands for as many others",
    "experts are drawn from their shares; nothing is known of which a text's tokens choose together",
    "tables change for all routers at once",
    "a host is busy as long as it computes, or its link is full",
)
"""What is modelled more coarsely than it is; more in the docstrings of `draws.py`, `routers.py` and `machines.py`."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A simulation and its result.

    Attributes:
        title: of what was simulated.
        assumed: the constants of the costs.
    """

    title: str
    site: Site
    trace: Trace
    options: Options
    result: Result
    assumed: tuple[Assumption, ...]

    @property
    def taken_for_granted(self) -> tuple[Assumption, ...]:
        """Every constant that does not follow from the model or the nodes."""
        of_restoring = (assumptions.START, assumptions.DISK, PROCESS_NOTICED, NODE_NOTICED, STANDBY_START)
        return tuple(dict.fromkeys((*self.assumed, *of_restoring)))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        site, options = self.site, self.options
        return {
            "title": self.title,
            "routers": len(site.routers) * site.twins,
            "routers_modelled": len(site.routers),
            "hosts": len(site.table.slots),
            "gpus": site.gpus,
            "nodes": site.machines,
            "trace": str(self.trace),
            "skew": str(options.skew),
            "seed": options.seed,
            **self.result.to_dict(),
            "assumptions": [asdict(assumption) for assumption in self.taken_for_granted],
            "approximations": list(APPROXIMATIONS),
        }


def show(simulated: Simulated, console: Console) -> None:
    """Print it: what came of it first, what it rests on last."""
    console.print(Text(simulated.title, style="bold"))
    _sums(simulated, console)
    _times(simulated.result, console)
    _timeline(simulated.result, console)
    _failures(simulated.result, console)
    _assumed(simulated, console)


def _sums(simulated: Simulated, console: Console) -> None:
    site, result = simulated.site, simulated.result
    table = Table.grid(padding=(0, 2))
    table.add_row("asked", f"{simulated.trace}; experts {simulated.options.skew}")
    twins = f" ({len(site.routers)} modelled, each stands for {site.twins})" if site.twins > 1 else ""
    routers = len(site.routers) * site.twins
    table.add_row(
        "cluster",
        f"{_count(routers, 'router')}{twins}, {_count(len(site.table.slots), 'expert host')}, "
        f"{site.settings.pages * site.settings.page_size} tokens in the KV pages of each router",
    )
    after = f" after {result.warmup_s:g} s" if result.warmup_s else ""
    table.add_row(
        "requests",
        f"{result.finished} finished, {result.failed} failed, {result.refused} refused, {result.unfinished} unfinished in "
        f"{result.seconds:.1f} s{after}",
    )
    each = f", {result.per_node[1]:.1f} a node" if site.machines > 1 else ""
    each += f", {result.per_gpu[1]:.1f} a GPU" if site.gpus > 1 else ""
    table.add_row("generated", f"{result.output_rate:.1f} tokens/s{each}")
    each = f", {result.per_node[0]:.1f} a node" if site.machines > 1 else ""
    table.add_row(
        "prompts", f"{result.prompt_rate:.1f} tokens/s{each}; {result.prefix_hit_tokens} tokens found in KV pages"
    )
    table.add_row("queue", f"{result.queue_mean:.1f} requests wait on average, {result.queue_most} at most")
    table.add_row(
        "KV pages",
        f"{result.kv_mean:.0%} in use on average, {result.kv_most:.0%} at most; {result.preemptions} preemptions",
    )
    table.add_row(
        "hosts",
        f"busy {result.utilisation:.0%} of the time, the busiest {result.busiest:.0%}; the mean host has "
        f"{result.balance:.0%} of what the busiest has to do in a step's layer, {result.placement_balance:.0%} in the long run",
    )
    console.print(table)


def _times(result: Result, console: Console) -> None:
    table = Table(title="milliseconds", title_justify="left")
    for name in ("", "mean", "p50", "p90", "p99", "longest"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in (("to the first token", result.ttft), ("between tokens", result.itl)):
        table.add_row(name, *_milliseconds(times))
    console.print(table)


def _milliseconds(times: Percentiles) -> list[str]:
    if not times.count:
        return ["-"] * 5
    return [f"{1e3 * value:.1f}" for value in (times.mean, times.p50, times.p90, times.p99, times.longest)]


def _timeline(result: Result, console: Console) -> None:
    if not result.moments:
        return
    table = Table(title="time line", title_justify="left")
    names = ("to s", "tokens/s", "prompts/s", "waiting", "running", "KV pages", "hosts busy", "busiest", "balance")
    for name in (*names, "hosts", "routers", "unreachable"):
        table.add_column(name, justify="right")
    together = -(-len(result.moments) // _MOMENTS_SHOWN)
    for begin in range(0, len(result.moments), together):
        moments = result.moments[begin : begin + together]
        last = moments[-1]
        table.add_row(
            f"{last.at:.1f}",
            f"{_mean(moment.output_rate for moment in moments):.1f}",
            f"{_mean(moment.prompt_rate for moment in moments):.1f}",
            str(last.waiting),
            str(last.running),
            f"{last.kv_use:.0%}",
            f"{_mean(moment.utilisation for moment in moments):.0%}",
            f"{_mean(moment.busiest for moment in moments):.0%}",
            f"{_mean(moment.balance for moment in moments):.2f}",
            str(last.hosts),
            str(last.routers),
            str(last.unreachable or ""),
        )
    console.print(table)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _failures(result: Result, console: Console) -> None:
    for effect in result.failures:
        console.print(
            f"{effect.target} failed at {effect.at:g} s: of {effect.streams} streams the longest pause was "
            f"{effect.longest_gap_s:.2f} s, the median {effect.median_gap_s:.2f} s ({effect.usual_gap_s:.2f} s at another "
            f"moment); {effect.moved} went on at another router, {effect.failed} requests failed",
            soft_wrap=True,
            markup=False,
        )
    if not result.happenings:
        return
    table = Table(title="what happened", title_justify="left")
    for name in ("at s", "what", "to", ""):
        table.add_column(name, justify="right" if name == "at s" else "left")
    for happening in result.happenings[:_HAPPENINGS_SHOWN]:
        table.add_row(f"{happening.at:.2f}", happening.what, happening.subject, happening.detail)
    console.print(table)
    more = len(result.happenings) - _HAPPENINGS_SHOWN
    if more > 0:
        console.print(f"and {more} more: --json")


def _assumed(simulated: Simulated, console: Console) -> None:
    table = Table(title="taken for granted", title_justify="left")
    for name in ("what", "value", "source"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for entry in simulated.taken_for_granted:
        table.add_row(entry.name, _value(entry), entry.source)
    console.print(table)
    for line in APPROXIMATIONS:
        console.print(f"and: {line}", soft_wrap=True, markup=False)


def _value(entry: Assumption) -> str:
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if entry.unit == "s" and 0 < entry.value < 1000 * scale:
            return f"{entry.value / scale:.3g} {unit}"
    return f"{entry.value:.3g} {entry.unit}".strip()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
