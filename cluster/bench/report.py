"""A measurement as tables on a terminal: what came of it, what went wrong, and what to mistrust."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .figures import Figures, Ratio, Times
from .run import Part, Result

BUSY_CLIENT = 0.5
"""Share of a core beyond which this client may be what limits, or what the server lacks."""

_NOTES = (
    "to the first token: from sending a request, connecting included",
    "between tokens: tokens that come together share the time since those before them evenly",
    "standstill: between two deliveries, however many tokens they bring",
)


def show(result: Result, console: Console) -> None:
    """Print it: figures first, then failures and doubts."""
    plan = result.plan
    for index, server in enumerate(plan.servers):
        console.print(Text(f"{server.name}: {server.model} at {server.address}", style="bold"))
        console.print(_table(result, index))
        _trouble(result, index, console)
    if len(plan.servers) > 1:
        console.print(Text(f"{plan.servers[0].name} over {plan.servers[1].name}", style="bold"))
        console.print(_ratios(result))
    for note in _NOTES:
        console.print(Text(note, style="dim"))
    console.print(Text(f"seed {plan.workload.seed}", style="dim"))


def _table(result: Result, server: int) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("load", no_wrap=True)
    for name in ("requests", "output\ntok/s", "all\ntok/s", "requests\n/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("to the first token, ms", "between tokens, ms"):
        table.add_column(f"{name}\np50 / p95 / p99", justify="right", no_wrap=True)
    table.add_column("standstill\np99, ms", justify="right", no_wrap=True)
    for level in result.plan.levels:
        for part in (part for part in result.parts if (part.server, part.level) == (server, level)):
            table.add_row(*_row(part, rounds=result.plan.rounds))
    return table


def _row(part: Part, *, rounds: int) -> list[str]:
    found = part.figures
    return [
        f"{part.level}" + (f", round {part.round + 1}" if rounds > 1 else ""),
        f"{found.answered}" + (f" of {found.requests}" if found.failed else ""),
        f"{found.output_per_s:.1f}",
        f"{found.total_per_s:.1f}",
        f"{found.requests_per_s:.3g}",
        _times(found.ttft),
        _times(found.itl),
        _ms(found.delivery_gap.p99) if found.delivery_gap.count else "-",
    ]


def _times(times: Times) -> str:
    if not times.count:
        return "-"
    return " / ".join(_ms(value) for value in (times.p50, times.p95, times.p99))


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _trouble(result: Result, server: int, console: Console) -> None:
    for level in result.plan.levels:
        for found in result.figures_of(server, level):
            for line in doubts(found):
                console.print(Text(f"{level}: {line}", style="yellow"))
            if found.cached_tokens is not None:
                told = f"{found.cached_tokens} of {found.prompt_tokens} prompt tokens came from the server's cache"
                console.print(Text(f"{level}: {told}"))


def doubts(found: Figures) -> list[str]:
    """What went wrong at one level, and what its figures may not mean."""
    lines = [
        f"{count} of {found.requests} requests: {outcome}" + (f" ({told})" if (told := found.details[outcome]) else "")
        for outcome, count in sorted(found.outcomes.items())
        if outcome != "ok"
    ]
    if found.short:
        lines.append(f"{found.short} answers are shorter than was asked for")
    if found.miscounted:
        lines.append(f"{found.miscounted} answers have another number of token ids than their usage says")
    if guessed := found.counted_by.get("messages", 0):
        lines.append(f"nothing tells the number of tokens of {guessed} answers: each message counts as one")
    if found.counted_by.get("usage") and found.tokens_per_delivery > 1.05:
        lines.append(
            f"{found.tokens_per_delivery:.2f} tokens a delivery, and no token ids: those of an answer are spread evenly over it"
        )
    if found.client_cpu > BUSY_CLIENT:
        lines.append(f"this client took {found.client_cpu:.0%} of a core: it may be what limits")
    if found.late.p99 > 0.01:
        lines.append(
            f"requests were sent up to {found.late.longest * 1e3:.0f} ms late (p99 {found.late.p99 * 1e3:.0f})"
        )
    if found.client_lag_s > 0.05:
        lines.append(f"this client was kept from its sockets for up to {found.client_lag_s * 1e3:.0f} ms")
    return lines


def _ratios(result: Result) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("load", no_wrap=True)
    named = {level: result.ratios(level) for level in result.plan.levels}
    for name in next(iter(named.values())):
        table.add_column(name.replace(", ", "\n"), justify="right")
    for level, ratios in named.items():
        table.add_row(str(level), *(_ratio(one) for one in ratios.values()))
    return table


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return "-"
    spread = f"\n({found.least:.2f}-{found.most:.2f})" if found.rounds > 1 else ""
    return f"{found.median:.2f}{spread}"
