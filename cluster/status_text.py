"""The state of a cluster, for the terminal: what is wrong comes first, then every process, the routers' work, what happened."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_STYLES = {
    "ok": "green",
    "ready": "green",
    "standby": "cyan",
    "degraded": "yellow",
    "starting": "yellow",
    "leaving": "yellow",
}
"""Of healths and process states; every other one is red."""

_EVENTS_SHOWN = 10


def print_status(found: dict[str, Any], console: Console, *, now: float | None = None) -> None:
    """Print a `ClusterStatus` as /v1/moray/status gives it.

    Args:
        now: seconds since the Unix epoch that the events' ages are reckoned from; by default the present.
    """
    now = time.time() if now is None else now
    console.print(_headline(found))
    for reason in found["reason"].split("; ") if found["reason"] else []:
        console.print(f"  {escape(reason)}", highlight=False)
    _print_table(_processes(found), console)
    _print_table(_routers(found), console)
    for router in found["routers"]:
        if trouble := _trouble(router):
            console.print(Text.assemble(f"  {router['router_id']}: ", trouble))
    _print_table(_events(found, now), console)


def age(seconds: float) -> str:
    """A time span in its largest unit: `12 s`, `5 min`, `3 h`, `2 d`."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _headline(found: dict[str, Any]) -> Text:
    line = Text.assemble(f"{found['model']}  ", _coloured(found["health"]))
    if not found["epoch"]:  # nobody but the controller knows the rest, and it does not answer
        return line
    line.append(f"  epoch {found['epoch']}  balance {found['balance']:.2f}")
    if found["missing_replicas"]:
        line.append(f"  {found['missing_replicas']} experts below {found['min_replicas']} replicas", "yellow")
    return line


def _processes(found: dict[str, Any]) -> Table:
    told = any(p["instructions"] for p in found["processes"])
    table = _table("id", "role", "pid", "node", *(["computes with"] if told else []), "state", "read", "detail")
    for p in found["processes"]:
        read = f"{(p['data_bytes_read'] + p['header_bytes_read']) / 1e6:,.1f} MB"
        if p["data_bytes_copied"]:
            read += f" + {p['data_bytes_copied'] / 1e6:,.1f} copied"
        where = [p["id"], p["role"].replace("_", " "), str(p["pid"]), p["node"]]
        table.add_row(*where, *([p["instructions"]] if told else []), _coloured(p["state"]), read, escape(p["detail"]))
    return table


def _routers(found: dict[str, Any]) -> Table:
    table = _table("router", "running", "waiting", "pages free", "cached", "in use", "total", "hits", "tokens out")
    numbers = (
        "running",
        "waiting",
        "pages_free",
        "pages_cached",
        "pages_in_use",
        "pages_total",
    )
    drafts = any(r["drafted_tokens"] for r in found["routers"])
    if drafts:
        table.add_column("drafts right")
    for r in found["routers"]:
        prompts = r["prompt_tokens"] + r["prefix_hit_tokens"]
        hits = f"{r['prefix_hit_tokens'] / prompts:.0%}" if prompts else "-"
        cells = [r["router_id"], *(str(r[name]) for name in numbers), hits, str(r["generated_tokens"])]
        if drafts:
            cells.append(f"{r['accepted_tokens']} of {r['drafted_tokens']}")
        table.add_row(*cells)
    return table


def _trouble(router: dict[str, Any]) -> Text:
    """What a router has had to do about expert hosts that were late or lost; empty where nothing."""
    counts = [
        ("resent", router["resent_shares"]),
        ("hedged", router["hedged_shares"]),
        ("fenced", router["fenced_hosts"]),
    ]
    found = [Text(f"late {host}", "yellow") for host in router["late_hosts"]]
    found += [Text(f"{name} {count}") for name, count in counts if count]
    if router["unreachable_experts"]:
        found.insert(0, Text(f"{router['unreachable_experts']} unreachable", "red"))
    return Text(", ").join(found)


def _events(found: dict[str, Any], now: float) -> Table:
    """The newest first."""
    table = _table("ago", "event", "of", "took", "detail")
    for event in sorted(found["events"], key=lambda event: float(event["at"]), reverse=True)[:_EVENTS_SHOWN]:
        took = f"{event['seconds']:.2f} s" if event["seconds"] else ""
        table.add_row(age(now - event["at"]), event["what"], event["subject"], took, escape(event["detail"]))
    return table


def _print_table(table: Table, console: Console) -> None:
    if table.row_count:
        console.print()
        console.print(table)


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def _coloured(word: str) -> Text:
    return Text(word, _STYLES.get(word, "red"))
