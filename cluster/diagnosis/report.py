"""Prints an examination: a line for each finding, what to do below it, and a matrix of the links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .examination import Examination
from .findings import Finding, merged
from .kernel_paths import KernelPath
from .link_meter import LinkSpeed
from .text import duration

_STYLES = {"ok": "dim", "warn": "bold yellow", "fail": "bold red"}

_MATRIX_NODES = 12
"""As many columns as a screen has room for; of more nodes the slowest links are listed."""

_SLOWEST = 10


def show(examination: Examination, console: Console) -> None:
    """Print the findings, those that are shared word for word once, and the links."""
    nodes = len(examination.nodes)
    lines = merged(examination.findings, nodes)
    table = Table.grid(padding=(0, 2))
    several = any(finding.node for finding in lines) and nodes != 1
    for finding in lines:
        style = _STYLES[finding.level]
        place = [Text(finding.node, style)] if several else []
        table.add_row(Text(finding.level, style), Text(finding.check, style), *place, _said(finding))
    console.print(table)
    if examination.links:
        _show_links([facts.node for facts in examination.nodes], examination.links, console)
    console.print(_counts(lines))


def show_kernels(paths: Sequence[KernelPath], console: Console, *, whole: bool) -> None:
    """Print which path each kernel takes; in one line for each device and path, unless the whole is wanted."""
    if not whole:
        counts = Counter((entry.path, entry.device) for entry in paths)
        for (path, device), count in counts.items():
            console.print(f"{count} kernels take the {path} path on {device} (--kernels says why)", style="dim")
        return
    table = Table("kernel", "device", "path", "why", title="kernels", title_justify="left")
    for entry in paths:
        table.add_row(entry.kernel, entry.device, entry.path, entry.why)
    console.print(table)


def _said(finding: Finding) -> Text:
    text = Text(finding.what, "dim" if finding.level == "ok" else "bold")
    if finding.what_to_do:
        text.append(f"\n-> {finding.what_to_do}", "not bold")
    return text


def _counts(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    if not counts["fail"] and not counts["warn"]:
        return "no problems found"
    return f"{counts['fail']} to mend, {counts['warn']} to consider, {counts['ok']} fine"


def _show_links(nodes: Sequence[str], links: Sequence[LinkSpeed], console: Console) -> None:
    if len(nodes) > _MATRIX_NODES:
        slowest = sorted(links, key=lambda link: link.bytes_per_s or -link.round_trip_s)[:_SLOWEST]
        table = Table("from", "to", "link", title=f"the {len(slowest)} slowest links", title_justify="left")
        for link in slowest:
            table.add_row(link.source, link.target, _cell(link))
        console.print(table)
        return
    numbers = {node: str(number) for number, node in enumerate(nodes, start=1)}
    table = Table("from \\ to", *numbers.values(), title="links: Gbit/s, round trip", title_justify="left")
    measured = {(link.source, link.target): link for link in links}
    for source, number in numbers.items():
        cells = ["" if source == target else _cell(measured.get((source, target))) for target in numbers]
        table.add_row(f"{number} {source}", *cells)
    console.print(table)


def _cell(link: LinkSpeed | None) -> str:
    if link is None:
        return "-"
    rate = "" if link.bytes_per_s is None else f"{link.bytes_per_s * 8 / 1e9:.3g}, "
    return f"{rate}{duration(link.round_trip_s)}"
